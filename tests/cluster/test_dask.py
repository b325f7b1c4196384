"""Samples on a Dask cluster over TLS: scheduler, workers and client are on hosts of their own."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.problems import Problem
from tests.cli import wait_until
from tests.cluster.hosts import ROOT, Network, num_lines
from tests.pipeline.samples.rows import all_bytes, random_logs, write
from tests.raised import told
from tests.security.certificates import Certificate

HOSTS = ["head", "a", "b", "client"]
DASK, DASK_SUBMIT = (Path(sys.executable).with_name(name) for name in ("dask", "dask-submit"))
SLOWED = Path(__file__).with_name("slowed.py")
BUILD = ROOT / "jobs" / "build_samples.py"


class DaskHosts:
    """The scheduler is on host head, a worker on a and on b, and jobs are submitted on client."""

    address = "tls://head:8786"

    def __init__(self, net: Network, folder: Path) -> None:
        """Start scheduler and workers, which end with their hosts, and wait until the scheduler listens."""
        self.net, self.folder, self.begun = net, folder, folder / "begun.txt"
        self._certificate = Certificate(folder / "tls", *HOSTS)
        self._start("head", "scheduler", "--protocol", "tls", "--host", "head", "--no-dashboard")
        for name in "ab":
            self.start_worker(name)
        wait_until(lambda: net["client"].listens("head", 8786), self.log)

    def start_worker(self, name: str) -> None:
        slow = ["--preload", str(SLOWED), "--local-directory", "/mnt/dask"]
        self._start(name, "worker", self.address, "--nthreads", "1", "--no-nanny", "--no-dashboard", *slow)

    def variables(self, certificate: Certificate | None = None) -> dict[str, str]:
        """The variables of Dask on a host; with a certificate of the cluster's authority unless another is given."""
        own, tls = certificate or self._certificate, "DASK_DISTRIBUTED__COMM__TLS__"
        files = {f"{role}__CERT": own.cert for role in ("SCHEDULER", "WORKER", "CLIENT")}
        files |= {name.replace("CERT", "KEY"): own.key for name in files} | {"CA_FILE": self._certificate.ca}
        return {
            "BEGUN": str(self.begun), "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
            "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "20s",  # a host without power is missed so soon
            "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "True",
            **{f"{tls}{name}": str(file) for name, file in files.items()},
        }  # fmt: skip

    def submit(self, *words: object, log: Path) -> "subprocess.Popen[bytes]":
        options = ["--scheduler", self.address, "--wait-workers", 2, "--timeout", 90]
        return self.net["client"].start(DASK_SUBMIT, *options, *words, log=log, env=self.variables())

    def log(self) -> str:
        return "\n".join(f"{file.name}: {file.read_text()[-3000:]}" for file in sorted(self.folder.glob("*.log")))

    def _start(self, name: str, kind: str, *arguments: str) -> None:
        self.net[name].start(DASK, kind, *arguments, log=self.folder / f"{name}.log", env=self.variables())


@pytest.fixture(scope="module")
def dask(net: Network, tmp_path_factory: pytest.TempPathFactory) -> DaskHosts:
    return DaskHosts(net, tmp_path_factory.mktemp("dask"))


@pytest.mark.slow
def test_samples_whose_workers_host_dies_have_the_bytes_of_calm_ones(dask: DaskHosts, tmp_path: Path) -> None:
    """Files in between lie on a disk that all workers see. Of an extraction, test_slurm.py says the same."""
    logs, log, calm = tmp_path / "logs", tmp_path / "log.txt", tmp_path / "calm"
    write(logs, *([part[n::8] for n in range(8)] for part in random_logs(random.Random(5))))
    subprocess.run([sys.executable, BUILD, "--logs", logs, "--samples", calm], check=True, timeout=200)
    job = dask.submit(BUILD, "--logs", logs, "--samples", tmp_path / "samples", log=log)
    wait_until(lambda: num_lines(dask.begun) >= 6, lambda: log.read_text() + dask.log(), 250, job)
    dask.net.kill("b")
    assert job.wait(200) == 0, log.read_text() + dask.log()
    assert all_bytes(tmp_path / "samples") == all_bytes(calm)
    dask.net.revive("b")
    dask.start_worker("b")


def test_a_plain_address_is_refused_and_so_is_the_certificate_of_another_authority(
    dask: DaskHosts, tmp_path: Path
) -> None:
    client = dask.net["client"]
    plain = client.run(DASK_SUBMIT, "--scheduler", "tcp://head:8786", BUILD, "--help", check=False)
    assert plain.returncode == 2 and re.search(told(Problem.INSECURE_SCHEDULER, where="tcp://head:8786"), plain.stderr)
    none = client.run(DASK_SUBMIT, "--scheduler", dask.address, BUILD, "--help", check=False)
    assert none.returncode != 0 and re.search(told(Problem.NO_CERTIFICATES, where=dask.address), none.stderr)
    stranger = dask.variables(Certificate(tmp_path / "tls", "client"))
    refused = client.run(DASK_SUBMIT, "--scheduler", dask.address, BUILD, "--help", env=stranger, check=False)
    assert refused.returncode != 0 and "Traceback" not in refused.stderr and "error:" in refused.stderr
