"""benchmarks.gpu as a person calls it, on the CPU at a tiny size, and where there is no GPU."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.gpu.__main__ import app

TINY = ["--images", "200", "--dim", "16", "--dims", "4", "--samples-per-rank", "60", "--steps", "4"]


@pytest.mark.slow
def test_both_kinds_of_features_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    words = ["--device", "cpu", *TINY, "--dir", str(tmp_path / "workload"), "--json", str(out)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert figures["device"] == "cpu"
    for kind in ("full", "compact"):
        one = {name.removeprefix(f"{kind}_"): value for name, value in figures.items() if name.startswith(kind)}
        assert one["samples_per_s"] == pytest.approx(60 / one["step_ms"] * 1e3, rel=0.05)
        assert one["busy_share"] > 0 and 0 < one["last_loss"] < 2
        assert one["bytes_per_step"] == one["features_bytes"] + one["places_bytes"] + one["batch_bytes"]
        assert one["batch_bytes"] == pytest.approx(60 * (4 + 8), rel=0.05)
    assert figures["full_features_bytes"] == 8 * figures["compact_features_bytes"] > 0, "16 bfloat16, and 4 codes"
    assert figures["full_places_bytes"] == figures["compact_places_bytes"] > 0


def test_no_gpu_is_one_line_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["--dir", str(tmp_path / "workload")])
    assert result.exit_code == 1 and "error: no GPU found" in result.output
    assert not (tmp_path / "workload").exists()
