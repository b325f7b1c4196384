"""benchmarks.restart at a tiny size: every kind of kill has its figures, and costs few steps."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.restart.__main__ import CHECKPOINT_EVERY, DEADLINE_S, KINDS, Loss, app, summary


def test_the_figures_of_a_kind() -> None:
    losses = [Loss(3.0, 10), Loss(9.0, 40), Loss(4.0, 20)]
    assert summary(losses) == {"median_s_to_next_step": 4.0, "most_s_to_next_step": 9.0, "median_steps_again": 20}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_of_it(tmp_path: Path) -> None:
    out = tmp_path / "restart.json"
    result = CliRunner().invoke(app, ["--kills", "1", "--dir", str(tmp_path / "workload"), "--json", str(out)])
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    for kind in KINDS:
        assert 0.5 < figures[f"{kind}_median_s_to_next_step"] <= figures[f"{kind}_most_s_to_next_step"]
        assert 0 <= figures[f"{kind}_median_steps_again"] <= 2 * CHECKPOINT_EVERY
    assert figures["stopped_rank_median_s_to_next_step"] > DEADLINE_S
