"""Command lines of manifests that are run here: the sshd of an MPIJob's workers, and torchrun on its two nodes."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli import ran
from tests.cluster.hosts import PACKAGES, lacking, make_key, of_packages, parts_of_sshd
from tests.deploy.commandlines import expanded
from tests.deploy.manifests import overlay, pods
from tests.ranks import ROOT, environment
from tests.servers import free_ports
from tests.trainer.conftest import make_places

pytestmark = pytest.mark.cluster
USER = 1000


@pytest.fixture
def secrets() -> Iterator[Path]:
    """The keys as mpi-operator mounts them: root's, and read by the group of the pod."""
    if missing := lacking():
        pytest.skip(f"the sshd of an MPIJob was not started: this machine lacks {missing}")
    with tempfile.TemporaryDirectory(prefix="mpijob-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        make_key(folder / "id_rsa", "-t", "ecdsa", "-b", "521")
        (folder / "id_rsa.pub").rename(folder / "authorized_keys")
        for path in folder.iterdir():
            os.chown(path, 0, USER)
            path.chmod(0o640)
        (folder / "passwd").write_text(f"crossmedia:x:{USER}:{USER}::/tmp:/bin/sh\n")
        yield folder


def test_the_sshd_of_an_mpijob_lets_the_launcher_in_without_rights(secrets: Path) -> None:
    (job,) = [each for each in overlay("train-mpi") if each["kind"] == "MPIJob"]
    container = next(pod["spec"]["containers"][0] for pod in pods(job["spec"]["mpiReplicaSpecs"]["Worker"]))
    (port,) = free_ports(1)
    words = [str(PACKAGES / "bin" / "sshd"), *container["args"]]
    words = [word.replace("/secrets/ssh", str(secrets)).replace("=2222", f"={port}") for word in words]
    words += [f"-o{name}={path}" for name, path in parts_of_sshd().items()]  # Debian's lie elsewhere here
    env = os.environ | of_packages()
    server = subprocess.Popen(_as_user(secrets, *words), env=env, stderr=subprocess.PIPE, text=True)
    client = _as_user(
        secrets, "ssh", "-F", "none", "-p", str(port), "-i", str(secrets / "id_rsa"),
        "-o", "PasswordAuthentication=no", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
        "127.0.0.1", "id -u",
    )  # fmt: skip
    try:
        deadline_s = time.monotonic() + 30
        while (done := ran(*client, env=env)).returncode:
            assert server.poll() is None and time.monotonic() < deadline_s, done.stderr
            time.sleep(1)
        assert done.stdout.strip() == str(USER)
    finally:
        server.kill()
        server.wait()


def _as_user(secrets: Path, *words: str) -> list[str]:
    """The command line as the pod's user, who has a name there, without any right."""
    rights = f"setpriv --reuid {USER} --regid {USER} --clear-groups --no-new-privs --bounding-set -all"
    inside = f'mount --bind {secrets}/passwd /etc/passwd && exec {rights} "$@"'
    return ["unshare", "--mount", "sh", "-c", inside, "sh", *words]


def test_two_nodes_train_a_day(tmp_path: Path) -> None:
    places = make_places(tmp_path / "data")
    (job,) = [each for each in overlay("train-torchrun") if each["kind"] == "Job"]
    (pod,) = pods(job)
    (container,) = pod["spec"]["containers"]
    here = {"NODES": "2", "RANKS_PER_NODE": "1", "RUNS": str(tmp_path / "runs")}
    here |= {"SAMPLES": str(places.folder / "samples"), "STORE": str(places.folder / "features")}
    (port,) = free_ports(1)
    small = [f"--set={each}" for each in places.settings() if not each.startswith(("data.s", "run.dir", "run.name"))]
    nodes = []
    for index in range(2):
        words = expanded([*container["command"], *container["args"]], here | {"JOB_COMPLETION_INDEX": str(index)})
        words = [word.replace("train-0.train", "127.0.0.1").replace("29500", str(port)) for word in words]
        words[0] = str(Path(sys.executable).with_name(words[0]))
        variables = environment() | {"GLOO_SOCKET_IFNAME": "lo"}
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        nodes.append(subprocess.Popen([*words, *small], cwd=ROOT, env=variables, **output))
    said = [node.communicate(timeout=250)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    table = json.loads((tmp_path / "runs" / "daily" / "days.json").read_text())
    assert len(table) >= 1 and "2 ranks" in "".join(said)
