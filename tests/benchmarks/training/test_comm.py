"""benchmarks.comm at a tiny size: both communicators train the same model, and every figure is there."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.comm import app


@pytest.mark.slow
@pytest.mark.services
def test_figures_are_written(tmp_path: Path) -> None:
    out = tmp_path / "comm.json"
    sizes = ["--images", "200", "--samples-per-rank", "60", "--steps", "3", "--rounds", "1", "--ranks", "2"]
    done = CliRunner().invoke(app, [*sizes, "--dir", str(tmp_path / "workload"), "--json", str(out)])
    assert done.exit_code == 0, done.output
    figures = json.loads(out.read_text())
    torch, horovod = (figures[f"{name}_2_ranks_samples_per_s"] for name in ("torchrun", "horovodrun"))
    assert figures["torch_vs_horovod_at_2"] == torch / horovod
    assert all(figures[f"{name}_2_ranks_alltoall_of_8_mb_ms"] > 0 for name in ("torchrun", "horovodrun"))
