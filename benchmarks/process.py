"""Programs of a benchmark as processes of their own: run to their end, watched for the memory that they take."""

import contextlib
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from featurestore.errors import UserError

_POLL_S = 0.25


class RunFailedError(UserError):
    """A process of a benchmark failed; the text has its last lines."""


@dataclass(frozen=True)
class Memory:
    """What a process and those below it took at one moment, in bytes."""

    largest_resident: int
    """Of the largest process, with the pages of files that it has mapped."""
    anonymous: int
    """Of all together, without pages of files, which the kernel drops where memory is short."""


def run_to_end(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> list[Memory]:
    """Run a program to its end, its output in `log`; return its memory four times a second. Raises RunFailedError."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        with _ended(process), _watched(process.pid) as memory:
            code = process.wait()
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RunFailedError(f"{' '.join(command)}\nended with {code}:\n{tail}")
    return memory


@contextmanager
def _ended(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """The process is gone behind the block, also after Ctrl-C; horovodrun ends its ranks at SIGTERM."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


@contextmanager
def _watched(pid: int) -> Iterator[list[Memory]]:
    """The memory of `pid` and all below it, four times a second."""
    found: list[Memory] = []
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


def _memory(processes: Sequence[psutil.Process]) -> Memory:
    resident, anonymous = [0], 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            lines = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            anonymous += sum(int(lines[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem") if name in lines)
            resident.append(int(process.memory_info().rss))
    return Memory(max(resident), anonymous)
