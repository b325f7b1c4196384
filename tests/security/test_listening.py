"""Where our servers listen unless they are told otherwise: on loopback, so that nobody else reaches them.

docs/SECURITY.md has the same as a table. What takes longest runs with `make test-cluster`. As a program, a rank that
has found the others, says so, and stays until its folder has a file `end`.
"""

import contextlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.cli import wait_until
from tests.ranks import HOROVODRUN, ROOT, environment
from tests.trainer.conftest import Places
from trainer.comm import connect
from trainer.comm.comm import launcher_of

pytestmark = [pytest.mark.services, pytest.mark.long(8)]
BIN = Path(sys.executable).parent
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
TIMEOUT_S = 100


@contextlib.contextmanager
def started(words: list[str | Path], folder: Path, ready: Callable[[str], bool]) -> Iterator[psutil.Process]:
    """A command, from when it is ready by what it has printed or which files are there; killed with its children."""
    log = folder / "log.txt"
    with log.open("wb") as file:
        started = subprocess.Popen(list(map(str, words)), stdout=file, stderr=file, env=environment(), cwd=ROOT)
    try:
        wait_until(lambda: ready(log.read_text()), log.read_text, TIMEOUT_S, started)
        yield psutil.Process(started.pid)
    finally:
        for process in family(psutil.Process(started.pid)) if started.poll() is None else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        started.wait()


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all that it has started."""
    while True:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that ends while it is looked at
            return [process, *process.children(recursive=True)]


def listening(process: psutil.Process) -> list[str]:
    """The addresses at which a process and all that it has started listen."""
    found = []
    for each in family(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            sockets = each.net_connections(kind="inet")
            found += [socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN]
    return found


def all_ready(folder: Path, count: int) -> Callable[[str], bool]:
    return lambda _: all((folder / f"ready-{rank}").exists() for rank in range(count))


@pytest.mark.parametrize(
    ("words", "ready"),
    [
        ("-m serving serve {data}/model --port 0 --workers 2", "listening on"),
        ("-m explorer --runs {data} --port 0", "open http"),
        ("-m featurestore serve {data}/features --port 0 --cache-dir {tmp}/cache", "grpc"),
        pytest.param("-m tensorboard.main --logdir {data}/runs --port 0", "http://", marks=pytest.mark.cluster),
    ],
)
def test_servers(words: str, ready: str, places: Places, tmp_path: Path) -> None:
    words = words.format(data=places.folder, tmp=tmp_path)
    with started([sys.executable, *words.split()], tmp_path, lambda log: ready in log) as server:
        found = listening(server)
        assert found and set(found) <= set(LOOPBACK), found


def test_a_dask_cluster_of_ours(tmp_path: Path) -> None:
    """Scheduler, workers, nannies, and the pages of all of them."""
    script = tmp_path / "script.py"
    script.write_text(
        "import time\nfrom pipeline.cluster.tasks import connect\n"
        "if __name__ == '__main__':\n    with connect():\n        print('ready', flush=True)\n        time.sleep(600)\n"
    )
    words = [BIN / "dask-submit", "-n", "2", "--threads-per-worker", "1", script]
    with started(words, tmp_path, lambda log: "ready" in log) as submit:
        found = listening(submit)
        assert len(found) >= 4 and set(found) <= set(LOOPBACK), found


def by_torchrun() -> list[str]:
    """The words by which we start ranks where Horovod is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        return launcher_of(2)


@pytest.mark.parametrize("launcher", [lambda: [HOROVODRUN, "--gloo", "-np", "2", sys.executable], by_torchrun])
def test_ranks_of_ours(launcher: Callable[[], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rendezvous of horovodrun among them: tools/build_horovod.sh binds it to one address."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # torchrun leaves the file by which it found itself
    with started([*launcher(), __file__, tmp_path], tmp_path, all_ready(tmp_path, 2)) as ranks:
        found = listening(ranks)
        assert found and set(found) <= set(LOOPBACK), found


@pytest.mark.cluster
def test_ranks_of_torchrun_on_one_machine(tmp_path: Path) -> None:
    """The ranks listen on loopback; torch's store, in the launcher, everywhere: the exception in the table."""
    words = [BIN / "torchrun", "--nproc-per-node", "2", __file__, tmp_path]
    with started(words, tmp_path, all_ready(tmp_path, 2)) as launcher:
        ranks = [address for child in launcher.children() for address in listening(child)]
        assert set(ranks) <= set(LOOPBACK), ranks
        assert set(listening(launcher)) - set(LOOPBACK) == {"::"}


@pytest.mark.cluster
def test_one_rank_alone_listens_nowhere(tmp_path: Path) -> None:
    words = [sys.executable, __file__, tmp_path]
    with started(words, tmp_path, all_ready(tmp_path, 1)) as rank:
        assert listening(rank) == []


if __name__ == "__main__":
    comm, folder = connect(), Path(sys.argv[1])
    assert comm.allgather_object(comm.rank, name="ranks") == list(range(comm.size))
    (folder / f"ready-{comm.rank}").touch()
    while not (folder / "end").exists():
        time.sleep(0.05)
    comm.close()
