"""benchmarks.store as `make bench` calls it, at a tiny size: every variant runs, and gives right answers."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks.store import limit
from benchmarks.store.__main__ import app

HEADLINE = [
    "lookup_vs_numpy_take",
    "lookup_vs_numpy_take_10_deltas",
    "lookup_vs_lmdb",
    "lookup_vs_lance",
    "warm_open_s",
    "cache_build_vs_list_column",
]
TINY = ["--rows", "1000", "--keys", "256", "--rounds", "3", "--limit-mb", "96"]


@pytest.mark.slow
def test_all_variants_at_a_tiny_size(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # an arena for each thread would not fit into so small a limit
    monkeypatch.setattr(limit, "TIMES_OVER", 5)
    result = CliRunner().invoke(app, [*TINY, "--dir", str(tmp_path), "--json", str(tmp_path / "store.json")])
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "store.json").read_text())
    assert all(figures[name] > 0 for name in HEADLINE)
    assert figures["store_over_limit"] == pytest.approx(5, rel=0.01)
    assert 0 < figures["limit_cache_build_peak_mb"] < figures["memory_limit_mb"]
    for peer in ("lookup", "numpy_take", "lmdb_out", "lance_take"):
        assert figures[f"{peer}_rows_per_s"] > 0
    assert not [path for path in tmp_path.iterdir() if path.name != "store.json"], "nothing is left behind"
