"""A real S3 server on loopback, for tests: SeaweedFS."""

import contextlib
import functools
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from featurestore.storage.storage import Storage
from tests.cli import wait_until

ACCESS_KEY, SECRET_KEY, REGION = "testkey", "testsecret", "us-east-1"
READY_TIMEOUT_S = 60
MAX_VOLUMES = 20_000  # each bucket takes one or more; by default the free disk sets a limit that the tests reach

FILERS: dict[str, str] = {}
"""Of each SeaweedFS, by its endpoint: where it takes files without S3."""


class Server:
    """A SeaweedFS, with its files and its log in a folder; keeps its address over restarts. It starts in a second."""

    def __init__(self, folder: Path) -> None:
        s3, master, volume, filer = free_ports(4)
        self.endpoint = f"http://127.0.0.1:{s3}"
        FILERS[self.endpoint] = f"127.0.0.1:{filer}"
        self._command, self._folder = weed_command(folder, "127.0.0.1", s3, master, volume, filer), folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {**os.environ, "GOMAXPROCS": "1"}  # Go's threads look for work: a fifth of a server's time
        with (self._folder / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, cwd=self._folder, env=environment)
        wait_until(self._answers, (self._folder / "log.txt").read_text, READY_TIMEOUT_S, self._process)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.endpoint}/healthz", timeout=1):
            return True
        return False

    def kill(self) -> None:
        """SIGKILL: what it had not written to its files is lost."""
        if self._process is not None:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def weed_command(folder: Path, address: str, s3: int, master: int, volume: int, filer: int) -> list[str | Path]:
    """The command line of a SeaweedFS that listens on the ports of an address, and knows the key of these tests."""
    identity = {
        "name": "test",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "identities.json").write_text(json.dumps({"identities": [identity]}))
    options = {
        "dir": folder, "ip": address, "ip.bind": address, "s3.port": s3, "master.port": master,
        "volume.port": volume, "filer.port": filer, "admin.ui": "false", "webdav": "false", "s3.port.iceberg": 0,
        "s3.port.lance": 0, "master.telemetry": "false", "s3.config": folder / "identities.json",
        "volume.max": MAX_VOLUMES,
    }  # fmt: skip
    return [Path(sys.executable).with_name("weed"), "mini", *(f"-{name}={value}" for name, value in options.items())]


@contextlib.contextmanager
def environment_of(endpoint: str) -> Iterator[None]:
    """The usual variables, so that s3:// is the server at `endpoint`, here and in processes started from here."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        environment.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        environment.setenv("AWS_ENDPOINT_URL", endpoint)
        environment.setenv("AWS_DEFAULT_REGION", REGION)
        yield


@functools.cache
def client_of(endpoint: str) -> fsspec.AbstractFileSystem:
    """A client of its own, which is no store's."""
    return fsspec.filesystem("s3", endpoint_url=endpoint, skip_instance_cache=True)


def new_bucket() -> str:
    """An empty bucket of its own on the server of the environment, as s3://NAME."""
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    client_of(os.environ["AWS_ENDPOINT_URL"]).call_s3("create_bucket", Bucket=bucket)
    return f"s3://{bucket}"


def new_buckets(count: int) -> list[str]:
    """Empty buckets that have had a file: at a bucket's first one SeaweedFS waits 0.2 s, here for all at once."""

    def make(_: int) -> str:
        url = new_bucket()
        Storage(url).write_bytes("first", b"")
        Storage(url).delete("first")
        return url

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(make, range(count)))


def fill(bucket: str, files: Mapping[str, bytes]) -> None:
    """Write many files into a bucket of SeaweedFS, past S3: its client takes four milliseconds for each."""
    connection = http.client.HTTPConnection(FILERS[os.environ["AWS_ENDPOINT_URL"]])
    for path, data in files.items():
        connection.request("PUT", f"/buckets/{bucket}/{path}", data)
        with connection.getresponse() as answer:
            assert answer.status == 201, (path, answer.status, answer.read())
            answer.read()
    connection.close()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, and so do their gRPC twins 10,000 higher, which SeaweedFS takes too.

    They are lower than those that the kernel gives to connections. One of these could take a port while its server
    starts again, and who tries to reach a server that is away could even be connected with himself.
    """
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(11_000, 21_000)
        with socket.socket() as low, socket.socket() as high, contextlib.suppress(OSError):
            low.bind(("127.0.0.1", port))
            high.bind(("127.0.0.1", port + 10_000))
            if port not in found:
                found.append(port)
    return found
