"""A Dask cluster whose scheduler, workers and client are on hosts of their own, and speak TLS."""

import subprocess
import sys
from pathlib import Path

import trustme

from tests.cluster import buckets
from tests.cluster.conftest import BUCKET
from tests.cluster.hosts import Host, Network, wait_until
from tests.pipeline.conftest import draw_photo, encode_image

DASK = Path(sys.executable).with_name("dask")
DASK_SUBMIT = Path(sys.executable).with_name("dask-submit")
ROLES = ("SCHEDULER", "WORKER", "CLIENT")
IMAGES = 40
NETWORK = ["--backbone", "mobilenet_v3_small:avgpool", "--weights", "random:0"]
EXTRACT = [*NETWORK, "--dtype", "float32", "--precision", "float32", "--batch-size", "2", "--part-size", "2"]
SAME_ROWS = """
import sys
from tests.pipeline.features.test_killed import assert_same_rows
assert_same_rows(*sys.argv[1:])
"""
SLOW = """
import os, time
from pipeline.features import part
from pipeline.samples import groups
def slowed(work):
    def slow(*args):
        with open(DONE, "a") as done:
            print(os.getpid(), file=done, flush=True)
        time.sleep(0.3)
        return work(*args)
    return slow
part.prepare, groups.shuffle_piece = slowed(part.prepare), slowed(groups.shuffle_piece)
"""
"""What slow workers load first, so that a test can do something in the midst of a job: each image and each piece of a
log takes longer, and adds a line to done.txt beside this file."""


def write_slow(folder: Path) -> Path:
    """Write the file for `dask worker --preload`."""
    file = folder / "slow.py"
    file.write_text(f"DONE = {str(folder / 'done.txt')!r}\n{SLOW}")
    return file


def num_begun(folder: Path) -> int:
    """How many images or pieces slow workers have begun with; `folder` is that of `write_slow`."""
    done = folder / "done.txt"
    return len(done.read_text().splitlines()) if done.exists() else 0


def upload_images(net: Network, name: str, folder: Path, s3: dict[str, str]) -> None:
    """Draw images for an extraction, and copy them to S3 from a host."""
    folder.mkdir()
    for number in range(IMAGES):
        (folder / f"{number:02}.jpg").write_bytes(encode_image(draw_photo(number)))
    buckets.upload(net[name], folder, f"{BUCKET}/images", s3)


class DaskHosts:
    """The scheduler is on host head, a worker on a and on b, and jobs are submitted on client."""

    address = "tls://head:8786"

    def __init__(self, net: Network, folder: Path, env: dict[str, str]) -> None:
        self.net, self.folder = net, folder
        self._authority = trustme.CA()
        self._env = {
            **env, "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
            "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "20s",  # a host without power is missed so soon
        }  # fmt: skip
        write_slow(folder)

    def tls(self, host: Host, authority: trustme.CA | None = None) -> dict[str, str]:
        """The variables of a host's certificate, which is made; by the cluster's authority unless another is given."""
        files = self.folder / f"tls-{host.name}"
        files.mkdir(exist_ok=True)
        made = (authority or self._authority).issue_cert(host.name)
        made.private_key_pem.write_to_path(files / "key.pem")
        made.cert_chain_pems[0].write_to_path(files / "cert.pem")
        self._authority.cert_pem.write_to_path(files / "ca.pem")
        ours = {f"{role}__{name}": f"{name.lower()}.pem" for role in ROLES for name in ("CERT", "KEY")}
        places = {"CA_FILE": "ca.pem", **ours}
        found = {f"DASK_DISTRIBUTED__COMM__TLS__{name}": str(files / file) for name, file in places.items()}
        return {**found, "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "True"}

    def open(self) -> None:
        """Start scheduler and workers, which end with their hosts, and wait until the scheduler listens."""
        self._start("head", "scheduler", "--protocol", "tls", "--host", "head", "--no-dashboard")
        for name in "ab":
            self.start_worker(name)
        wait_until(lambda: self.net["client"].listens("head", 8786), self.log)

    def start_worker(self, name: str) -> None:
        slow = ["--preload", str(self.folder / "slow.py"), "--local-directory", "/mnt/dask"]
        self._start(name, "worker", self.address, "--nthreads", "1", "--no-nanny", "--no-dashboard", *slow)

    def submit(self, *words: object, log: Path) -> "subprocess.Popen[bytes]":
        (self.folder / "done.txt").unlink(missing_ok=True)
        client = self.net["client"]
        options = ["--scheduler", self.address, "--wait-workers", 2, "--timeout", 90]
        return client.start(DASK_SUBMIT, *options, *words, log=log, env={**self._env, **self.tls(client)})

    def wait_for_work(self, count: int, job: "subprocess.Popen[bytes]", log: Path) -> None:
        """Return once the workers have begun with so many images, or pieces of logs, of a job."""
        wait_until(lambda: num_begun(self.folder) >= count, lambda: log.read_text() + self.log(), 250, job)

    def log(self) -> str:
        return "\n".join(f"{file.name}: {file.read_text()[-3000:]}" for file in sorted(self.folder.glob("*.log")))

    def _start(self, name: str, kind: str, *arguments: str) -> None:
        host = self.net[name]
        host.start(DASK, kind, *arguments, log=self.folder / f"{name}.log", env={**self._env, **self.tls(host)})
