"""benchmarks.compact as a user calls it, at a tiny size."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.compact.__main__ import app

TINY = ["--images", "200", "--dim", "16", "--dims", "4", "--samples-per-rank", "60", "--steps", "4", "--rounds", "1"]


@pytest.mark.slow
def test_both_widths_at_a_tiny_size(tmp_path: Path) -> None:
    out = tmp_path / "compact.json"
    result = CliRunner().invoke(app, [*TINY, "--dir", str(tmp_path / "workload"), "--json", str(out)])
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert figures["compact_bytes_share"] == 8 / 32
    assert figures["compact_vs_full"] == figures["bfloat16_samples_per_s"] / figures["full_samples_per_s"] > 0
    speed = {name: figures[f"{name}_samples_per_s"] for name in ("bfloat16", "compute", "compute_from_numbers")}
    assert figures["samples_per_s_compact"] == speed["bfloat16"]
    assert figures["step_vs_compute_compact"] == speed["compute"] / speed["bfloat16"] > 0
    assert figures["step_vs_compute_compact_from_numbers"] == speed["compute_from_numbers"] / speed["bfloat16"]
    for name, figure in (("fuxictr", "vs_fuxictr_compact"), ("fuxictr_grouped", "vs_fuxictr_compact_grouped")):
        rival = figures.get(f"{name}_samples_per_s")  # none where FuxiCTR could not be installed
        assert figures[figure] == (rival and speed["bfloat16"] / rival)
