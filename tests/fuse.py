"""Death at a chosen moment: this process ends itself by SIGKILL at the n-th thing that it does to files.

And processes to die: forks, with all that the tests have imported, patched and bound; or small ones without.
"""

import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.running.spared import spare_the_disk

FORK = multiprocessing.get_context("fork")
SMALL = multiprocessing.get_context("forkserver")
"""Forks of a process that has imported the store and some tests of it alone. The tests' own holds networks and clusters
of other tests too, and each fork of it takes a tenth of a second."""
SMALL.set_forkserver_preload(["tests.preloaded"])
EVENTS = {"open", "os.link", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir"}


def small_process(work: Callable[..., object], *arguments: Any, name: str | None = None) -> BaseProcess:
    """Make a small process for `work`, which can be pickled: with our environment, and without waits for a disk."""
    return SMALL.Process(target=_work_small, args=(dict(os.environ), work, *arguments), name=name)


def _work_small(environment: Mapping[str, str], work: Callable[..., object], *arguments: Any) -> None:
    os.environ.update(environment)
    spare_the_disk()
    work(*arguments)


class Fuse:
    """Counts points in the life of a process, and ends it at one of them; at 0, it notes all of them instead.

    Between two of them nothing happens to files, so the point before a call is also the point after the last one.
    """

    def __init__(self, at: int, trace: Path) -> None:
        self._left, self._is_survey = at, at == 0
        self._trace = trace
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["Fuse"], tuple[int, Path]]:
        """For another process, before the first point."""
        return Fuse, (self._left, self._trace)

    def point(self, name: str) -> None:
        """Note the point and send SIGKILL where it is the chosen one."""
        with self._lock:
            self._left -= 1
            if self._left == 0 or self._is_survey:
                with self._trace.open("a") as file:
                    file.write(f"{name}\n")
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def watch_disk(self, root: str) -> None:
        """Every call of the system that touches files below `root`, and the middle of what is written. For good."""
        sync, open_file = os.fsync, io.open

        def audit(event: str, arguments: tuple) -> None:
            if event in EVENTS and _is_below(root, arguments[0]):
                self.point(f"{event} {_kind(arguments[0])}")

        def fsync(descriptor: int) -> None:
            self.point("fsync")
            sync(descriptor)

        def opened(file, mode="r", *arguments, **options):
            result = open_file(file, mode, *arguments, **options)
            is_ours = _is_below(root, file) and not set(mode).isdisjoint("wxa")
            return _HalfWritten(result, self) if is_ours else result

        os.fsync, io.open = fsync, opened
        sys.addaudithook(audit)

    def watch_s3(self, calls: set[str] | None = None) -> None:
        """Before and after every request to an S3 server; of the named ones alone where `calls` are given."""
        from s3fs import S3FileSystem

        call_s3 = S3FileSystem._call_s3

        async def watched(files, method, *arguments, **options):
            if calls is not None and method not in calls:
                return await call_s3(files, method, *arguments, **options)
            self.point(f"before {method}")
            answer = await call_s3(files, method, *arguments, **options)
            self.point(f"after {method}")
            return answer

        S3FileSystem._call_s3 = watched


class _HalfWritten:
    """A file whose first write goes in two halves, with a chance to die between them."""

    def __init__(self, file, fuse: Fuse) -> None:
        self._file, self._fuse = file, fuse
        self._is_first = True

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        if not self._is_first:
            return self._file.write(view)
        self._is_first = False
        self._file.write(view[: len(view) // 2])
        self._file.flush()
        self._fuse.point("write half")
        self._file.write(view[len(view) // 2 :])
        return len(view)

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self) -> "_HalfWritten":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _is_below(root: str, path: object) -> bool:
    if isinstance(path, int | type(None)):
        return False
    return os.fsdecode(os.fspath(path)).startswith(root)


def _kind(path: object) -> str:
    """Of a path below a store: its folder, and whether it is a temporary file."""
    parts = Path(os.fsdecode(os.fspath(path))).parts
    known = [part for part in parts if part in {"log", "data", "staging", "expired", "pins", "quarantine"}]
    return " ".join([*known[-1:], *(["temporary"] if parts[-1].startswith(".tmp-") else [])])
