"""A trace that cannot be written: one warning, and a run that is trained to its end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands.calls import call
from trainer.loop.summary import PLACE, SKIPPED_STEPS, TRACED_STEPS, tracing


def _traced(folder: Path) -> list[str]:
    """Trace some steps; return the warnings."""
    warnings: list[str] = []
    with tracing(folder, 1, warnings.append) as after_step:
        for _ in range(1 + SKIPPED_STEPS + TRACED_STEPS):
            torch.ones(3, 3) @ torch.ones(3, 3)
            after_step()
    return warnings


def test_a_trace_is_written_or_told_why_not(tmp_path: Path) -> None:
    folder = tmp_path / PLACE
    folder.touch()
    (warning,) = _traced(folder)
    assert warning.startswith(f"the trace {folder}/trace-rank-1.json cannot be written: ")
    folder.unlink()
    assert _traced(folder) == []
    (written,) = folder.iterdir()
    assert written.name == "trace-rank-1.json" and json.loads(written.read_text())["traceEvents"]


@pytest.mark.long
def test_a_run_without_a_place_for_its_trace_is_trained_to_its_end(places: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / PLACE).touch()
    settings = places.settings(run__dir=tmp_path, run__name="a", run__profile=True, train__max_steps=12)
    called = call(["trainer.main", *(f"--set={each}" for each in settings)])
    assert (called.code, called.trace) == (0, "") and called.err.count("warning: the trace ") == 1, called.err
    assert json.loads((tmp_path / "a" / "report.json").read_text())["global_step"] == 12
    assert "no trace was written" not in called.out
