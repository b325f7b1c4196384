"""benchmarks.gpu as a person calls it, on the CPU at a tiny size, and where there is no GPU."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.gpu.__main__ import app

NAMES = ("samples_per_s", "step_ms", "busy_share", "features_bytes", "places_bytes", "batch_bytes", "bytes_per_step")
NAMES += ("last_loss",)
TINY = ["--images", "200", "--dim", "16", "--dims", "4", "--samples-per-rank", "60", "--steps", "4"]


@pytest.mark.slow
def test_both_kinds_of_features_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    words = ["--device", "cpu", *TINY, "--dir", str(tmp_path / "workload"), "--json", str(out)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert figures["device"] == "cpu"
    kinds = ("compact_from_host", "compact", "full")
    for kind in kinds:
        one = {name: figures[f"{kind}_{name}"] for name in NAMES}
        assert one["samples_per_s"] == pytest.approx(60 / one["step_ms"] * 1e3, rel=0.05)
        assert one["busy_share"] > 0 and 0 < one["last_loss"] < 2
        assert one["bytes_per_step"] == one["features_bytes"] + one["places_bytes"] + one["batch_bytes"]
        assert one["batch_bytes"] == pytest.approx(60 * (4 + 8), rel=0.05)
    images = figures["compact_from_host_features_bytes"] / 8  # 4 numbers in bfloat16 each
    assert figures["full_features_bytes"] == 32 * images > 0, "16 numbers in bfloat16"
    assert figures["compact_features_bytes"] == 8 * images, "their places"
    assert figures["compact_last_loss"] == figures["compact_from_host_last_loss"]
    assert [figures[f"{kind}_features_on_device"] for kind in kinds] == [False, True, False]
    assert len({figures[f"{kind}_places_bytes"] for kind in kinds}) == 1


def test_no_gpu_is_one_line_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["--dir", str(tmp_path / "workload")])
    assert result.exit_code == 1 and "error: no GPU found" in result.output
    assert not (tmp_path / "workload").exists()
