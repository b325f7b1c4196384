"""What a process that trains for long does with its memory."""

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.trainer import frozen
from trainer.engine.machine import objects_frozen

pytestmark = pytest.mark.long


@pytest.fixture
def nothing_frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let go of what tests/conftest.py has frozen for all tests."""
    monkeypatch.setattr(gc, "get_freeze_count", frozen.count)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # to look at all that the tests hold takes a second
    gc.disable()
    gc.unfreeze()
    yield
    gc.freeze()
    gc.enable()


@pytest.mark.usefixtures("nothing_frozen")
def test_objects_are_frozen_for_the_block_alone() -> None:
    with pytest.raises(ZeroDivisionError), objects_frozen():
        assert gc.get_freeze_count() > 0
        raise ZeroDivisionError
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("nothing_frozen")
def test_what_was_frozen_before_stays_frozen() -> None:
    gc.freeze()
    with objects_frozen():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() > 0  # no fixed number: another thread may let go of frozen objects in between


def test_freed_blocks_are_used_again() -> None:
    """In a process of its own: in this one, other threads and tests cut pieces from the blocks that were freed."""
    done = subprocess.run([sys.executable, "-c", _PAGE_FAULTS], capture_output=True, text=True, check=True)
    faults = min(int(line) for line in done.stdout.splitlines())
    assert faults < 5_000  # of 39,000 pages: by default glibc keeps 40 MB of these 160


_PAGE_FAULTS = """
import resource
import torch
from trainer.engine.machine import keep_freed_memory

keep_freed_memory()
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.zeros(5_000_000) for _ in range(8)]
    del blocks
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
