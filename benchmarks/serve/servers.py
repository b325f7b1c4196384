"""Servers as processes pinned to one core, while this process, the client, keeps to the others."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from benchmarks.process import RunFailedError

_START_S = 180.0
_STOP_S = 30.0


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    port: int
    process: "subprocess.Popen[bytes]"


@contextlib.contextmanager
def started(arguments: Sequence[str], log: Path) -> Iterator[Server]:
    """Start a program of this repository with `--port` on the first core; it is ended behind the block.

    Raises RunFailedError where it ends, or does not say that it is ready.
    """
    port, cores = _free_port(), sorted(os.sched_getaffinity(0))
    command = ["taskset", "-c", str(cores[0]), sys.executable, *arguments, "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            _wait(process, f"http://127.0.0.1:{port}/v2/health/ready", log)
            os.sched_setaffinity(0, cores[1:] or cores)
            yield Server(port, process)
        finally:
            os.sched_setaffinity(0, cores)
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(URLError, OSError), urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise RunFailedError(f"a server did not answer at {url}:\n{tail}")


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port
