"""benchmarks.resume at a tiny size: equal runs do not differ, a last bit makes them differ a little, a seed much"""

import json
from pathlib import Path

import pytest
from rich.progress import Progress
from typer.testing import CliRunner

from benchmarks.resume.__main__ import app, differences, kills_of
from benchmarks.resume.runs import Runs, checkpoint_every
from benchmarks.resume.stall import app as stall_app
from benchmarks.workload import Knobs, make


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_controls(tmp_path: Path) -> None:
    knobs = Knobs(images=200, dim=8, samples_per_rank=16, steps=20, test_samples=60, users=100, shards=4, row_group=20)
    with Progress(disable=True) as progress:
        workload = make(tmp_path / "workload", knobs, progress)
    runs = Runs(workload, tmp_path / "scratch", "float64", 10)
    expected = runs.alone()
    assert set(differences(runs.alone(), expected).values()) == {0.0}
    nudged, reseeded = (differences(found, expected) for found in (runs.alone(nudged=True), runs.alone("train.seed=1")))
    assert 0 < nudged["dense"] < 1e-12
    assert 0 < nudged["logit_max"] < 1e-12
    assert reseeded["logit_max"] > 1e-3
    assert reseeded["logit_mean"] > 1e-4


@pytest.mark.parametrize("steps", [10, 100, 1_000, 2_000])
def test_a_kill_costs_steps_that_are_taken_again(steps: int) -> None:
    done = [kill - 1 for kill in kills_of(steps)]
    assert 2 <= len(done) <= 5
    assert done == sorted(set(done))
    assert all(0 < each < steps and each % checkpoint_every(steps) for each in done)
    assert len({each // checkpoint_every(steps) for each in done}) == len(done), "each comes further than the last one"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_of_it(tmp_path: Path) -> None:
    out = tmp_path / "resume.json"
    small = ["--steps", "10", "--dtype", "float64", "--samples", "16", "--dir", str(tmp_path / "workload")]
    result = CliRunner().invoke(app, [*small, "--json", str(out)])
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    columns = ("dense", "id_rows", "logit_max", "logit_mean", "log_loss")
    assert {figures[f"float64_10_steps_2_ranks_killed_vs_2_ranks_{column}"] for column in columns} == {0.0}
    for run in ("2_ranks", "4_ranks", "killed_and_changed", "last_bit"):
        assert all(figures[f"float64_10_steps_{run}_{column}"] < 1e-12 for column in columns)
    assert figures["float64_10_steps_killed_and_changed_dense"] > 0


@pytest.mark.slow
def test_the_stall_of_a_checkpoint(tmp_path: Path) -> None:
    words = ["--dir", tmp_path / "workload", "--json", tmp_path / "out.json", "--rounds", 1, "--checkpoints", 1]
    small = ["--images", 200, "--dim", 8, "--samples", 16]
    done = CliRunner().invoke(stall_app, [str(word) for word in [*words, *small]])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out.json").read_text())
    for variant in ("beside", "in_step"):
        assert 0 < found[f"{variant}_least_ms"] <= found[f"{variant}_checkpoint_stall_ms"]
        assert found[f"{variant}_share_of_a_minute"] == found[f"{variant}_checkpoint_stall_ms"] / 60_000
