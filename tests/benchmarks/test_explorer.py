"""The benchmark of the explorer at a tiny size: its figures are there, nothing failed, and memory stayed."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.explorer.__main__ import app


@pytest.mark.slow
def test_figures_are_written(tmp_path: Path) -> None:
    out = tmp_path / "explorer.json"
    small = ["--images", "2000", "--pictures", "40", "--rate", "50", "--seconds", "4"]
    for _ in range(2):  # the second takes the store of the first
        done = CliRunner().invoke(app, [*small, "--dir", str(tmp_path / "bench"), "--json", str(out)])
        assert done.exit_code == 0, done.output
    figures = json.loads(out.read_text())
    assert figures["pictures_failed"] == 0
    assert 0 < figures["first_page_s"] <= figures["slowest_page_s"]
    assert 0 < figures["pictures_p50_ms"] <= figures["pictures_p99_ms"]
    assert figures["rss_growth_mb"] < 20
