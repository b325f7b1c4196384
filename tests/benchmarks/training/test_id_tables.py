"""The benchmark of exact tables beside hashed ones: its key, and that both sides train on the same batches."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.id_tables import app, batch_of


@pytest.mark.slow
def test_figures_are_written(tmp_path: Path) -> None:
    out = tmp_path / "id_tables.json"
    options = ["--steps", "2", "--samples", "16", "--ids", "50", "--behaviors", "3"]
    done = CliRunner().invoke(app, [*options, "--json", str(out)])
    assert done.exit_code == 0, done.output
    figures = json.loads(out.read_text())
    assert figures["exact_vs_hashed_table"] == figures["exact_step_ms"] / figures["hashed_step_ms"]
    assert figures["at_most"] == 1.15 and figures["exact_admit_after_3_step_ms"] > 0


def test_ids_lie_within_their_number() -> None:
    fields = batch_of(3, samples=40, ids=50, behaviors=3).fields
    assert all(0 <= rows.values_N.min() <= rows.values_N.max() < 50 for rows in fields.values())
    assert len(fields["behavior_item"].values_N) == 120
