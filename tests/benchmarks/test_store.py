"""benchmarks.store as `make bench` calls it, at a tiny size: every variant runs, and gives right answers."""

import json
import os

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.store import limit
from benchmarks.store.__main__ import app
from benchmarks.store.cold import drop_page_cache, resident_pages
from tests.running.spared import REAL_FSYNC

HEADLINE = [
    "lookup_vs_numpy_take",
    "lookup_vs_numpy_take_10_deltas",
    "lookup_vs_lmdb",
    "lookup_vs_lance",
    "lookup_vs_rocksdb",
    "warm_open_s",
    "cache_build_vs_list_column",
]
TINY = ["--rows", "1000", "--keys", "256", "--rounds", "3", "--depths", "1,2", "--limit-mb", "32"]


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
    assert figures["cold_share_left_in_memory"] <= 0.01 or figures["cold_store_open_s"] is None
    assert figures["open_2_deep_files"] > figures["open_2_deep_compacted_files"] == 16
    for peer in ("lookup", "numpy_take", "lmdb_out", "rocksdb_get", "rocksdb_multi_get", "lance_take", "lance_by_key"):
        for column in ("1_thread", "2_threads"):
            assert figures[f"{peer}_{column}_rows_per_s"] > 0
    assert not [path for path in tmp_path.iterdir() if path.name != "store.json"], "nothing is left behind"


def test_depths_that_do_not_ascend_are_one_message():
    result = CliRunner().invoke(app, ["--depths", "10,1"])
    assert result.exit_code == 2
    assert "--depths" in result.output and "10,1" in result.output


def test_dropped_pages_are_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", REAL_FSYNC)
    probe, path = tmp_path / "probe.bin", tmp_path / "folder" / "rows.bin"
    path.parent.mkdir()
    for each in (probe, path):
        np.ones(8 << 20, np.uint8).tofile(each)
    assert resident_pages(path) == (2048, 2048)
    with probe.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_pages(probe)[0]:
        pytest.skip("files of this folder stay in memory whatever one says")
    assert drop_page_cache(path.parent) == 0
    assert resident_pages(path) == (0, 2048)


def test_rows_of_the_large_store_hold_their_keys():
    keys_U = limit.large_keys(100)
    features_UD = limit.features_of(keys_U)
    assert features_UD.shape == (100, 4096)
    found = sum(features_UD[:, place].astype(np.uint64) << np.uint64(14 * place) for place in range(5))
    assert np.array_equal(found, keys_U.view(np.uint64))
