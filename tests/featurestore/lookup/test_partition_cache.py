"""The cache files of a partition: shared by ranks and runs, built again where they are damaged or old."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from featurestore import FeaturePartition, FeatureStore, StoreInfo, owner_of, shard_of
from featurestore.errors import (
    MissingKeysError,
)


def files_of(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}


def load_and_look(url: str, cache: Path, keys: "np.ndarray", results: "multiprocessing.Queue[bytes]") -> None:
    with FeaturePartition.load(url, cache_dir=cache) as partition:
        results.put(partition.lookup(keys).features_UD.tobytes())


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 11])
def test_ranks_share_the_rows_and_the_cache(store: FeatureStore, cache: Path, make_rows, num_ranks: int) -> None:
    rows = make_rows(400, store.info)
    store.put(rows)
    FeaturePartition.load(store, cache_dir=cache).close()
    before = files_of(cache)
    assert len(before) == 24
    total = 0
    for rank in range(num_ranks):
        with FeaturePartition.load(store, rank, num_ranks, cache) as partition:
            mine = owner_of(shard_of(rows.keys_N, 8), num_ranks) == rank
            assert np.array_equal(partition.owns(rows.keys_N), mine)
            assert np.array_equal(partition.lookup(rows.keys_N[mine]).features_UD, rows.features_ND[mine])
            total += partition.num_rows
            if num_ranks > 1:
                with pytest.raises(MissingKeysError, match=rf"rank {rank} of {num_ranks} does not own"):
                    partition.lookup(rows.keys_N[~mine])
    assert total == 400
    assert files_of(cache) == before  # nothing was built again


def test_only_changed_shards_are_built_again(store: FeatureStore, cache: Path, make_rows) -> None:
    rows = make_rows(200, store.info)
    store.put(rows)
    FeaturePartition.load(store, cache_dir=cache).close()
    before = files_of(cache)
    changed = make_rows(["images/0.jpg"], store.info, seed=5)
    store.put(changed)
    with FeaturePartition.load(store, cache_dir=cache) as partition:
        assert np.array_equal(partition.lookup(changed.keys_N).features_UD, changed.features_ND)
        assert np.array_equal(partition.lookup(rows.keys_N[1:]).features_UD, rows.features_ND[1:])
    after = files_of(cache)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 3


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        *[(suffix, damage) for suffix in ("rows.bin", "keys.npy", "json") for damage in ("shorter", "empty", "gone")],
        ("rows.bin", "longer"),
        ("keys.npy", "another key"),
        ("json", "another header"),
        ("keys.npy", "another header"),
    ],
)
def test_damaged_cache_files_are_built_again(
    store: FeatureStore, cache: Path, make_rows, suffix: str, damage: str
) -> None:
    rows = make_rows(100, store.info)
    store.put(rows)
    FeaturePartition.load(store, cache_dir=cache).close()
    victim = next(cache.glob(f"shard-0003-*.{suffix}"))
    whole = victim.read_bytes()
    victim.write_bytes(
        {
            "shorter": whole[:-1],
            "empty": b"",
            "gone": b"",
            "longer": whole + b"x",
            "another key": whole[:-8] + bytes(8),
            "another header": b"\x00" + whole[1:],
        }[damage]
    )
    if damage == "gone":
        victim.unlink()
    with FeaturePartition.load(store, cache_dir=cache) as partition:
        assert np.array_equal(partition.lookup(rows.keys_N).features_UD, rows.features_ND)
    # The seal says which file of rows was checked: where those were built again that is another one.
    assert victim.read_bytes() == whole or suffix == "json"


def test_rows_damaged_by_a_power_cut_are_found_after_the_restart(
    store: FeatureStore, cache: Path, make_rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(100, store.info)
    store.put(rows)
    FeaturePartition.load(store, cache_dir=cache).close()
    before = files_of(cache)
    victim = next(cache.glob("shard-0003-*.rows.bin"))
    whole = victim.read_bytes()
    victim.write_bytes(bytes(len(whole)))  # the size is right
    monkeypatch.setattr("featurestore.lookup.cache.current_boot", lambda: "the next start")
    for _ in range(2):
        with FeaturePartition.load(store, cache_dir=cache) as partition:
            assert np.array_equal(partition.lookup(rows.keys_N).features_UD, rows.features_ND)
        assert victim.read_bytes() == whole
    intact = {name: time for name, time in before.items() if name.endswith("bin") and "0003" not in name}
    assert {name: files_of(cache)[name] for name in intact} == intact
    assert all('"the next start"' in path.read_text() for path in cache.glob("*.json"))


def test_a_memory_store_is_cached_on_disk_too(memory_url: str, cache: Path, info: StoreInfo, make_rows) -> None:
    store = FeatureStore.create(memory_url, info)
    rows = make_rows(30, info)
    store.put(rows)
    steps: list[tuple[int, int]] = []
    with FeaturePartition.load(store, cache_dir=cache, progress=lambda done, total: steps.append((done, total))) as p:
        assert np.array_equal(p.lookup(rows.keys_N).features_UD, rows.features_ND)
    assert steps == [(i, 8) for i in range(1, 9)]


def test_processes_may_build_one_cache_at_once(store: FeatureStore, cache: Path, make_rows) -> None:
    rows = make_rows(2000, store.info)
    store.put(rows)
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[bytes] = context.Queue()
    processes = [context.Process(target=load_and_look, args=(store.url, cache, rows.keys_N, results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert found == [rows.features_ND.tobytes()] * 4
    assert len(list(cache.iterdir())) == 24


def test_the_default_cache_is_in_the_users_cache_folder(
    store: FeatureStore, tmp_path: Path, make_rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "xdg"))
    store.put(make_rows(3, store.info))
    FeaturePartition.load(store).close()
    assert list((tmp_path / "xdg" / "crossmedia" / "features").glob("*.rows.bin"))
