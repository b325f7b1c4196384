"""benchmarks.flight as `make bench` calls it, at a tiny size."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.flight import app


@pytest.mark.slow
def test_a_server_is_measured_against_a_partition(tmp_path: Path) -> None:
    words = ["--rows", "1000", "--keys", "100", "--rounds", "3", "--dir", str(tmp_path / "data")]
    done = CliRunner().invoke(app, [*words, "--json", str(tmp_path / "x.json")])
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "x.json").read_text())
    for prefix in ("", "vectors_"):
        ratio = figures[f"{prefix}flight_rows_per_s"] / figures[f"{prefix}partition_rows_per_s"]
        assert figures[f"{prefix}flight_vs_local"] == pytest.approx(ratio) and ratio > 0
    assert list((tmp_path / "data").iterdir()) == []
