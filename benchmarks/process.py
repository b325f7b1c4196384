"""Programs of a benchmark as processes of their own: run to their end, or servers that answer on one core."""

import contextlib
import os
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil

from benchmarks.problems import Problem
from featurestore.errors import UserError
from trainer.launch import ended, free_port

_POLL_S = 0.25
_START_S = 180.0
_LINES = 15


class RunFailedError(UserError):
    """A process of a benchmark failed; the text has its last lines."""


def run_to_end(command: Sequence[str], log: Path) -> list[int]:
    """Run a program to its end, its output in `log`; return its memory four times a second. Raises RunFailedError.

    Memory is bytes of all its processes together, without pages of files, which the kernel drops where memory is short.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        with ended(process), _watched(process.pid) as memory:
            code = process.wait()
    if code:
        raise RunFailedError(Problem.ENDED, " ".join(command), code, _tail(log))
    return memory


@contextmanager
def _watched(pid: int) -> Iterator[list[int]]:
    """The memory of `pid` and all below it, four times a second."""
    found: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL_S):
            try:
                root = psutil.Process(pid)
                found.append(_memory([root, *root.children(recursive=True)]))
            except psutil.NoSuchProcess:
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()


def _memory(processes: Sequence[psutil.Process]) -> int:
    anonymous = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            lines = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            anonymous += sum(int(lines[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem") if name in lines)
    return anonymous


def memory_of_children() -> int:
    """Return the bytes of memory of all processes that this one has started, counted as `run_to_end` does."""
    return _memory(psutil.Process().children(recursive=True))


@contextmanager
def serving(arguments: Sequence[str], log: Path) -> Iterator[int]:
    """Start a server, a program of this repository, on the first core, and yield its port once it is ready.

    In the block this process, its client, keeps to the other cores. Raises RunFailedError where the server ends.
    """
    port = free_port()
    command = ["taskset", "-c", str(min(os.sched_getaffinity(0))), sys.executable, *arguments, "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        with ended(process), _on_other_cores():
            _wait(process, f"http://127.0.0.1:{port}/v2/health/ready", log)
            yield port


@contextmanager
def _on_other_cores() -> Iterator[None]:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores - {min(cores)} or cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(URLError, OSError), urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise RunFailedError(Problem.SERVER_SILENT, url, _tail(log))


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LINES:])


def fuxictr_python() -> Path:
    """Find the Python of FuxiCTR's environment, which tools/install_for.sh makes where FuxiCTR can be had."""
    return Path(sys.prefix) / "fuxictr" / "bin" / f"python{sysconfig.get_python_version()}"
