"""Writers that die at a chosen moment, and what they did until then."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fuse import Fuse, small_process


@pytest.fixture
def make_fuse(tmp_path: Path) -> Iterator[Callable[[int], Fuse]]:
    """A fuse for the process that starts next."""
    yield lambda at: Fuse(at, tmp_path / "trace")


def watched(fuse: Fuse, root: str, work: Callable[[], None]) -> None:
    fuse.watch_disk(root)
    work()


@pytest.fixture
def dies_at(make_fuse: Callable[[int], Fuse]) -> Callable[[int, Callable[[], None], str], bool]:
    """Do `work`, which can be pickled, in a process that dies at its n-th thing to do with files below a root: whether
    it did."""

    def run(at: int, work: Callable[[], None], root: str) -> bool:
        process = small_process(watched, make_fuse(at), root, work)
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0

    return run
