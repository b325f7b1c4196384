"""What a process that trains for long does with its memory."""

import gc
import resource

import pytest
import torch

from trainer.engine.memory import keep_freed_memory, objects_frozen


def test_objects_are_frozen_for_the_block_alone() -> None:
    before = gc.get_freeze_count()
    with pytest.raises(ZeroDivisionError), objects_frozen():
        assert gc.get_freeze_count() > before
        raise ZeroDivisionError
    assert gc.get_freeze_count() == 0


def test_freed_blocks_are_used_again() -> None:
    keep_freed_memory()

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(5_000_000)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 500  # of 4,900 pages
