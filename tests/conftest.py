"""Fixtures that several areas share: a real S3 server."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

ACCESS_KEY, SECRET_KEY = "testkey", "testsecret"
READY_TIMEOUT_S = 60


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, and so does their gRPC twin 10,000 higher, which SeaweedFS takes too."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as low, socket.socket() as high:
            low.bind(("127.0.0.1", 0))
            port = low.getsockname()[1]
            try:
                high.bind(("127.0.0.1", port + 10_000))
            except (OSError, OverflowError):
                continue
            found.append(port)
    return found


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a SeaweedFS server that lives as long as the tests; its credentials are in the environment."""
    folder: Path = tmp_path_factory.mktemp("seaweedfs")
    identity = {
        "name": "test",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "identities.json").write_text(json.dumps({"identities": [identity]}))
    s3, master, volume, filer = free_ports(4)
    options = {
        "dir": folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "s3.port": s3, "master.port": master,
        "volume.port": volume, "filer.port": filer, "admin.ui": "false", "webdav": "false", "s3.port.iceberg": 0,
        "s3.port.lance": 0, "master.telemetry": "false", "s3.config": folder / "identities.json",
    }  # fmt: skip
    command = [Path(sys.executable).with_name("weed"), "mini", *(f"-{name}={value}" for name, value in options.items())]
    with (folder / "log.txt").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        endpoint = f"http://127.0.0.1:{s3}"
        wait_until_healthy(server, f"{endpoint}/healthz", folder / "log.txt")
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
            environment.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
            environment.setenv("AWS_ENDPOINT_URL", endpoint)
            environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
            yield endpoint
    finally:
        os.kill(server.pid, signal.SIGKILL)
        server.wait()


def wait_until_healthy(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    pytest.fail(f"SeaweedFS did not start: {log.read_text(errors='replace')[-2000:]}")


@pytest.fixture
def s3_url(s3_endpoint: str) -> str:
    """An empty bucket of its own, as s3://NAME."""
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3", use_listings_cache=False).call_s3("create_bucket", Bucket=bucket)
    return f"s3://{bucket}"
