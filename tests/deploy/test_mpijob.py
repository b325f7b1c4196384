"""The sshd of an MPIJob's workers: by the manifest's command line, without rights, it lets the launcher in."""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import PACKAGES, lacking, lacking_packages
from tests.deploy.manifests import overlay, pods
from tests.servers import free_ports

pytestmark = pytest.mark.cluster
USER = 1000
HELPERS = PACKAGES / "usr" / "lib" / "openssh"


@pytest.fixture
def secrets() -> Iterator[Path]:
    """The keys as mpi-operator mounts them: root's, and read by the group of the pod."""
    if missing := lacking() or lacking_packages("sshd"):
        pytest.skip(f"the sshd of an MPIJob was not started: this machine lacks {missing}")
    with tempfile.TemporaryDirectory(prefix="mpijob-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "521", "-N", "", "-f", folder / "id_rsa"],
            env=_unpacked(),
            check=True,
        )
        (folder / "id_rsa.pub").rename(folder / "authorized_keys")
        for path in folder.iterdir():
            os.chown(path, 0, USER)
            path.chmod(0o640)
        (folder / "passwd").write_text(f"crossmedia:x:{USER}:{USER}::/tmp:/bin/sh\n")
        yield folder


def _unpacked() -> dict[str, str]:
    """The variables by which Debian's ssh, unpacked in a folder, finds its parts."""
    libraries = ":".join(str(path) for path in sorted((PACKAGES / "usr" / "lib").glob("*-linux-gnu")))
    return {**os.environ, "PATH": f"{PACKAGES / 'bin'}:{os.environ['PATH']}", "LD_LIBRARY_PATH": libraries}


def test_it_lets_the_launcher_in(secrets: Path) -> None:
    (job,) = [each for each in overlay("train-mpi") if each["kind"] == "MPIJob"]
    container = next(pod["spec"]["containers"][0] for pod in pods(job["spec"]["mpiReplicaSpecs"]["Worker"]))
    (port,) = free_ports(1)
    words = [str(PACKAGES / "bin" / "sshd"), *container["args"]]
    words = [word.replace("/secrets/ssh", str(secrets)).replace("=2222", f"={port}") for word in words]
    # Debian's parts of sshd lie elsewhere here.
    words += [
        f"-o{name}={path}"
        for name, path in {"SshdSessionPath": HELPERS / "sshd-session", "SshdAuthPath": HELPERS / "sshd-auth"}.items()
        if path.exists()
    ]
    server = subprocess.Popen(_as_user(secrets, *words), env=_unpacked(), stderr=subprocess.PIPE, text=True)
    try:
        client = _as_user(
            secrets, "ssh", "-F", "none", "-p", str(port), "-i", str(secrets / "id_rsa"),
            "-o", "PasswordAuthentication=no", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
            "127.0.0.1", "id -u",
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while (done := subprocess.run(client, env=_unpacked(), capture_output=True, text=True, check=False)).returncode:
            assert server.poll() is None and time.monotonic() < deadline, done.stderr
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
