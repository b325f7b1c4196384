"""Secrets reach no log, configuration or report: commands that fail, or answer, with planted ones, and all they wrote.

Planted are the keys of an object store, which refuses them; a password in an address; tokens; keys of TLS. Those that
start many processes run with `make test-cluster`.
"""

import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from PIL import Image

from tests.cli import ran
from tests.commands.calls import call
from tests.ranks import HOROVODRUN, ROOT, environment
from tests.security.certificates import Certificate
from tests.security.test_listening import started
from tests.trainer.conftest import Places, change_column

pytestmark = [pytest.mark.services, pytest.mark.long]
SECRET, SESSION, PASSWORD = "plantedsecret0123456789ABCDEFabcdefghijk", "plantedsession0123456789", "plantedpassword"
TOKEN, OTHER_TOKEN = "plantedtoken-0123456789abcdef", "plantedwrongtoken-0123456789"
SHORT_TOKEN = "plantedshort"
BIN = Path(sys.executable).parent
RANKS = [HOROVODRUN, "--gloo", "-np", 2, sys.executable]
SUPERVISOR = [sys.executable, "-m", "trainer.supervise", "--max-np", 2]
SUPERVISOR += ["--max-restarts-without-progress", 0, "--", "python"]


class Work:
    """A folder in which commands work, with planted credentials in their environment, and all that they print."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder = folder
        self.environment = environment() | {
            "AWS_ACCESS_KEY_ID": "testkey",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_SESSION_TOKEN": SESSION,
            "AWS_ENDPOINT_URL": endpoint,
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        self.printed = ""

    def fails(self, *words: object, because: str) -> None:
        """Run a command line, which has to end with an error that says `because`."""
        done = ran(*words, cwd=ROOT, env=self.environment, timeout=200)
        self._failed(done.returncode, done.stdout + done.stderr, because)

    def fails_here(self, *words: object, because: str) -> None:
        """Do so in this process, where no other one is part of what is looked at."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            called = call(list(map(str, words)))
        self._failed(called.code, called.out + called.err + called.trace, because)

    def _failed(self, code: int, said: str, because: str) -> None:
        self.printed += said
        assert code != 0 and because in said, said[-3000:]

    def check(self, *secrets: str) -> None:
        """No secret is in what was printed, nor in any file of the folder."""
        files = [path for path in self.folder.rglob("*") if path.is_file() and "planted" not in path.parts]
        texts = {"stdout and stderr": self.printed.encode()} | {str(path): path.read_bytes() for path in files}
        found = [(name, secret) for name, text in texts.items() for secret in secrets if secret.encode() in text]
        assert not found


@pytest.fixture
def work(tmp_path: Path, s3_endpoint: str) -> Iterator[Work]:
    """It has none of the planted secrets at the end."""
    work = Work(tmp_path, s3_endpoint)
    yield work
    work.check(SECRET, SESSION, PASSWORD, TOKEN, OTHER_TOKEN, SHORT_TOKEN)


def python(*words: object) -> list[object]:
    return [sys.executable, *words]


def options(places: Places, **settings: object) -> list[str]:
    """Options of a training for places, with other settings."""
    return [f"--set={each}" for each in places.settings(**settings)]


REFUSED = "Access"  # AccessDenied, or "The AWS Access Key Id you provided ...", by server and request


class TestKeysOfAnObjectStore:
    @pytest.mark.cluster
    @pytest.mark.parametrize("launcher", [RANKS, SUPERVISOR], ids=["ranks", "supervisor"])
    def test_a_training_that_finds_no_store(self, launcher: list[object], work: Work, places: Places) -> None:
        """The launcher has the keys in its command lines, the supervisor hands them to its agents; the run is local."""
        words = options(places, run__name="a", run__dir=work.folder / "runs", data__store="s3://bucket/features")
        work.fails(*launcher, "-m", "trainer.main", *words, because="s3://bucket/features")

    def test_a_training_that_fails_on_the_way(self, work: Work, places: Places) -> None:
        """Run folder, configuration and logs are there when a rank cannot go on."""
        samples = Path(shutil.copytree(places.folder / "samples", work.folder / "samples"))
        bad = samples / "train" / "day=2026-01-02.parquet"
        change_column(bad, "label", lambda rows: [[2] * len(row) for row in rows])
        words = options(places, run__name="b", run__dir=work.folder / "runs", data__samples=samples)
        work.fails_here("trainer.main", *words, because=bad.name)
        assert (work.folder / "runs" / "b" / "config.yaml").is_file()

    @pytest.mark.cluster
    def test_jobs_and_their_cluster(self, work: Work, places: Places) -> None:
        """Dask's scheduler, workers and nannies have the keys in their environment."""
        (work.folder / "images").mkdir()
        images = ["--images", work.folder / "images", "--weights", "random:0", "--backbone", "resnet18:avgpool"]
        Image.new("RGB", (40, 40)).save(work.folder / "images" / "a.jpg")
        submit = [BIN / "dask-submit", "-n", "1"]
        work.fails(*submit, "jobs/extract_features.py", *images, "--store", "s3://bucket/x", because="s3://bucket/x")
        logs = ["--logs", "s3://bucket/logs", "--samples", work.folder / "samples"]
        work.fails(*submit, "jobs/build_samples.py", *logs, because="s3://bucket/logs")
        export = python("-m", "jobs.export_model", "--run", places.folder / "runs" / "run", "--out", "s3://bucket/m")
        work.fails(*export, because="s3://bucket/m")

    @pytest.mark.cluster
    def test_runs_and_servers_that_find_nothing(self, work: Work, places: Places) -> None:
        words = options(places, run__name="c", run__dir="s3://bucket/runs")
        work.fails(*python("-m", "trainer.main", *words), because="s3://bucket/runs")
        for command in ("featurestore", "serving"):
            work.fails(*python("-m", command, "serve", "s3://bucket/x", "--port", "0"), because="s3://bucket/x")


class TestPasswords:
    @pytest.mark.cluster
    def test_in_the_address_of_the_object_store(self, work: Work, places: Places) -> None:
        """Refused before anything is sent, by the store, images and runs."""
        work.environment["AWS_ENDPOINT_URL"] = f"http://me:{PASSWORD}@127.0.0.1:9"
        told = "AWS_ENDPOINT_URL=http://me:***@127.0.0.1:9 has a password"
        work.fails(*python("-m", "featurestore", "info", "s3://bucket/x"), because=told)
        extract = python("jobs/extract_features.py", "--images", "s3://bucket/i", "--weights", "random:0")
        work.fails(*extract, "--store", work.folder / "store", because=told)
        words = options(places, run__name="d", run__dir="s3://bucket/runs")
        work.fails(*RANKS, "-m", "trainer.main", *words, because=told)

    @pytest.mark.cluster
    def test_in_a_setting_or_an_option(self, work: Work) -> None:
        place = f"https://me:{PASSWORD}@example.com/x"
        work.fails(*python("-m", "trainer.main", f"data.store={place}"), because="https://me:***@example.com/x")
        work.fails(*python("-m", "featurestore", "info", place), because="https://me:***@example.com/x")
        extract = python("jobs/extract_features.py", "--images", place, "--weights", "random:0")
        work.fails(*extract, "--store", work.folder / "store", because="https://me:***@example.com/x")


class TestTokensAndKeys:
    @pytest.fixture
    @staticmethod
    def files(work: Work) -> dict[str, Path]:
        """Files with planted contents, which are not looked through."""
        folder = work.folder / "planted"
        key = Certificate(folder).key.read_bytes()
        for name, content in {"tokens": TOKEN, "short": SHORT_TOKEN}.items():
            (folder / name).write_text(f"{content}\n")
        (folder / "half").write_bytes(key[: len(key) // 2])
        for path in folder.iterdir():
            path.chmod(0o600)
        return {path.stem: path for path in folder.iterdir()}

    def test_of_a_scorer_that_answers(self, work: Work, places: Places, files: dict[str, Path]) -> None:
        """Right and wrong tokens, a body that is none, figures, and the end: nothing of them is in log or figures."""
        words: list[str | Path] = [sys.executable, "-m", "serving", "serve", places.folder / "model", "--port", "0"]
        words += ["--token-file", files["tokens"], "--tls-cert", files["cert"], "--tls-key", files["key"]]
        with started(words, work.folder, lambda log: "listening on" in log) as server:
            line = next(each for each in (work.folder / "log.txt").read_text().split() if each.startswith("https://"))
            with httpx2.Client(base_url=line, verify=False, timeout=30) as client:
                for token in (TOKEN, OTHER_TOKEN):
                    headers = {"Authorization": f"Bearer {token}"}
                    for answer in (
                        client.get("/metrics", headers=headers),
                        client.post("/v1/score", headers=headers, content=b"{"),
                    ):
                        work.printed += answer.text
                        assert (answer.status_code == 401) == (token == OTHER_TOKEN)
            server.send_signal(signal.SIGTERM)
            server.wait(60)
        work.check(_body(files["key"]))

    @pytest.mark.parametrize(("command", "folder"), [("serving", "model"), ("featurestore", "features")])
    def test_that_are_wrong(
        self, command: str, folder: str, work: Work, places: Places, files: dict[str, Path]
    ) -> None:
        server = [command, "serve", places.folder / folder, "--port", "0"]
        work.fails_here(*server, "--token-file", files["short"], because="characters and can be guessed")
        work.fails_here(*server, "--tls-cert", files["cert"], "--tls-key", files["half"], because="half")
        work.fails_here(*server, "--token-file", files["key"], because="token")
        work.check(_body(files["key"]), _body(files["half"]))


def _body(key: Path) -> str:
    """The first line of a PEM file's contents."""
    return key.read_text().splitlines()[1]


def test_the_search_finds_what_is_there(work: Work) -> None:
    report = work.folder / "report.json"
    report.write_text(f'{{"key": "{SECRET}"}}')
    with pytest.raises(AssertionError, match="plantedsecret"):
        work.check(SECRET)
    report.unlink()
