"""One rank's partition and its cache files: the right row or none, missing and hidden keys, files in one matrix."""

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurestore import FeaturePartition, FeatureRows, FeatureStore, StoreInfo, owner_of, shard_of
from featurestore.errors import (
    FeatureStoreError,
    MissingKeysError,
    SnapshotNotFoundError,
    StorageError,
    StoreNotFoundError,
)
from featurestore.keys import HashIndex, shard_of_hash
from tests.featurestore.conftest import make_rows, put
from tests.fuse import FORK


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "dim", "threads"),
    [("bfloat16", 1, 1), ("bfloat16", 3000, 3), ("float16", 7, 3), ("float32", 8, 1), ("float32", 3001, 2)],
)
def test_lookup_gives_the_rows_in_the_order_asked(
    tmp_path: Path, cache: Path, info: StoreInfo, dtype: str, dim: int, threads: int
) -> None:
    info = info.model_copy(update={"dtype": dtype, "dim": dim})
    store = FeatureStore.create(tmp_path / "other", info)
    rows = make_rows(900, info)
    store.put(rows)
    index = np.random.default_rng(1).integers(0, 900, 2500)  # duplicates, and more than one piece of work
    with FeaturePartition.load(store, cache_dir=cache, threads=threads) as partition:
        assert (partition.dim, partition.info.dtype, partition.num_rows) == (dim, dtype, 900)
        assert partition.snapshot_version == 1 and partition.info.kind == info
        found = partition.lookup(rows.keys_N[index])
        assert found.features_UD.dtype == info.storage_dtype
        assert np.array_equal(found.features_UD, rows.features_ND[index])
        assert not found.missing_U.any()
        out = np.empty((2500, dim), info.storage_dtype)
        assert partition.lookup(rows.keys_N[index], out=out).features_UD is out
        assert np.array_equal(out, rows.features_ND[index])
        assert len(partition.lookup([]).features_UD) == 0


@pytest.mark.parametrize("memory_bytes", [1 << 40, 200 * 16])
def test_what_is_larger_than_half_of_the_memory_is_not_read_at_its_opening(
    store: FeatureStore, cache: Path, rows: FeatureRows, memory_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    monkeypatch.setattr("featurestore.lookup.rowfiles.populate", lambda rows_MD: read.append(len(rows_MD)))
    monkeypatch.setattr("featurestore.lookup.rowfiles.physical_memory_bytes", lambda: memory_bytes)
    with FeaturePartition.load(store, cache_dir=cache) as partition:
        assert sum(read) == (200 if memory_bytes > 200 * 32 else 0)  # of 16 bytes each
        assert np.array_equal(partition.lookup(rows.keys_N).features_UD, rows.features_ND)


@pytest.mark.parametrize("policy", ["zeros", "learned"])
def test_missing_rows_are_zeros_and_counted(store: FeatureStore, cache: Path, rows: FeatureRows, policy: str) -> None:
    """Or an error that names some keys and the count."""
    store.delete(rows.keys_N[3:4])
    with FeaturePartition.load(store, cache_dir=cache, missing=policy) as partition:
        out = np.full((11, 8), 7, np.uint16)
        found = partition.lookup([*rows.keys_N[:10], 5], out=out)
        assert np.flatnonzero(found.missing_U).tolist() == [3, 10]
        assert not out[[3, 10]].any() and np.array_equal(out[:3], rows.features_ND[:3])
        assert partition.missing_count == 2
        partition.lookup([5, 5])
        assert partition.missing_count == 4
    with FeaturePartition.load(store, cache_dir=cache) as partition:
        with pytest.raises(MissingKeysError, match=r"6 keys have no feature in snapshot 2 .*: 1, 2, 3, 4, 5, …"):
            partition.lookup([1, 2, 3, int(rows.keys_N[0]), 4, 5, 6])
        partition.lookup(rows.keys_N[:3])
        assert partition.missing_count == 0


@pytest.mark.parametrize("block_rows", [1, 4, 11, 100])
def test_blocks_are_a_lookup_in_pieces(store: FeatureStore, cache: Path, rows: FeatureRows, block_rows: int) -> None:
    keys = [*rows.keys_N[:6], 5, *rows.keys_N[6:10]]
    with FeaturePartition.load(store, cache_dir=cache, missing="zeros") as partition:
        whole = partition.lookup(keys)
        lent = partition.lookup_blocks(np.array(keys), block_rows)
        blocks = [(block.features_UD.copy(), block.missing_U) for block in lent]
        assert [len(features) for features, _ in blocks[:-1]] == [min(block_rows, 11)] * (len(blocks) - 1)
        assert np.array_equal(np.concatenate([features for features, _ in blocks]), whole.features_UD)
        assert np.array_equal(np.concatenate([missing for _, missing in blocks]), whole.missing_U)
        assert partition.missing_count == 2
        assert list(partition.lookup_blocks(np.empty(0, np.int64), block_rows)) == []
    with FeaturePartition.load(store, cache_dir=cache) as partition, pytest.raises(MissingKeysError, match="1 key"):
        next(partition.lookup_blocks(np.array(keys), block_rows))


def test_wrong_arguments_are_named(store: FeatureStore, cache: Path, tmp_path: Path, rows: FeatureRows) -> None:
    with pytest.raises(ValueError, match="rank=2"):
        FeaturePartition.load(store, 2, 2, cache)
    with pytest.raises(ValueError, match="'skip'"):
        FeaturePartition.load(store, cache_dir=cache, missing="skip")  # type: ignore[arg-type]
    with pytest.raises(StoreNotFoundError):
        FeaturePartition.load(tmp_path / "nothing", cache_dir=cache)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cache folder"):
        FeaturePartition.load(store, cache_dir=tmp_path / "file")
    partition = FeaturePartition.load(store, cache_dir=cache)
    with pytest.raises(ValueError, match="missing=zeros or learned"):
        partition.hide(True)
    for out in (np.empty((3, 7), np.uint16), np.empty((3, 8), np.float16), np.empty((8, 3), np.uint16).T):
        with pytest.raises(ValueError, match="out is"):
            partition.lookup(rows.keys_N[:3], out=out)
    partition.close()
    with pytest.raises(FeatureStoreError, match="closed"):
        partition.lookup(rows.keys_N)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_hidden_images_have_no_feature(store: FeatureStore, cache: Path, rows: FeatureRows, num_ranks: int) -> None:
    for rank in range(num_ranks):
        with FeaturePartition.load(store, rank, num_ranks, cache_dir=cache, missing="zeros") as partition:
            owned = partition.owns(rows.keys_N)
            keys_U, features_UD = rows.keys_N[owned], rows.features_ND[owned]
            partition.hide(True)
            found = partition.lookup(keys_U)
            assert found.missing_U.all() and not found.features_UD.any()
            assert partition.missing_count == len(keys_U)
            assert partition.contains(keys_U).all()
            partition.hide(False)
            assert np.array_equal(partition.lookup(keys_U).features_UD, features_UD)


def test_it_serves_on_when_snapshot_and_cache_are_gone(store: FeatureStore, cache: Path, rows: FeatureRows) -> None:
    with FeaturePartition.load(store, cache_dir=cache) as partition:
        for path in [*cache.iterdir(), *Path(store.url, "data").rglob("*.parquet")]:
            path.unlink()  # mapped files live on
        assert np.array_equal(partition.lookup(rows.keys_N).features_UD, rows.features_ND)
        first = next(partition.rows(1))
    assert first.any()  # an array that looks into the files keeps them mapped, also when the partition is closed


def test_an_empty_store_serves_nothing(store: FeatureStore, cache: Path) -> None:
    with FeaturePartition.load(store, cache_dir=cache, missing="learned") as partition:
        found = partition.lookup([1, 2])
        assert found.missing_U.all() and not found.features_UD.any() and not partition.contains([1, 2]).any()
    assert not cache.exists()
    with pytest.raises(SnapshotNotFoundError):
        FeaturePartition.load(store, cache_dir=cache, version=9)


def files_of(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}


def load_and_look(url: str, cache: Path, keys_U: np.ndarray) -> bytes:
    with FeaturePartition.load(url, cache_dir=cache) as partition:
        return partition.lookup(keys_U).features_UD.tobytes()


@pytest.mark.parametrize("num_ranks", [1, 3, 11])
def test_ranks_share_rows_and_cache(store: FeatureStore, cache: Path, rows: FeatureRows, num_ranks: int) -> None:
    FeaturePartition.load(store, cache_dir=cache).close()
    before = files_of(cache)
    assert len(before) == 24
    total = 0
    for rank in range(num_ranks):
        with FeaturePartition.load(store, rank, num_ranks, cache) as partition:
            mine = owner_of(shard_of(rows.keys_N, 8), num_ranks) == rank
            assert np.array_equal(partition.owns(rows.keys_N), mine)
            assert np.array_equal(partition.contains([*rows.keys_N, 5]), [*mine, False])
            assert np.array_equal(partition.lookup(rows.keys_N[mine]).features_UD, rows.features_ND[mine])
            total += partition.num_rows
            if num_ranks > 1:
                with pytest.raises(MissingKeysError, match=rf"rank {rank} of {num_ranks} does not own"):
                    partition.lookup(rows.keys_N[~mine])
    assert total == len(rows.keys_N)
    assert files_of(cache) == before  # nothing was built again


def test_only_changed_shards_are_built_again(store: FeatureStore, cache: Path, rows: FeatureRows) -> None:
    FeaturePartition.load(store, cache_dir=cache).close()
    before = files_of(cache)
    changed = put(store, ["images/0.jpg"], seed=5)
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
    ],
)
def test_damaged_cache_files_are_built_again(
    store: FeatureStore, cache: Path, rows: FeatureRows, suffix: str, damage: str
) -> None:
    FeaturePartition.load(store, cache_dir=cache).close()
    victim = next(cache.glob(f"shard-0003-*.{suffix}"))
    whole = victim.read_bytes()
    victim.write_bytes({"shorter": whole[:-1], "longer": whole + b"x"}.get(damage, b""))
    if damage == "gone":
        victim.unlink()
    with FeaturePartition.load(store, cache_dir=cache) as partition:
        assert np.array_equal(partition.lookup(rows.keys_N).features_UD, rows.features_ND)
    # The seal says which file of rows was checked: where those were built again that is another one.
    assert victim.read_bytes() == whole or suffix == "json"


@pytest.mark.parametrize("num_files", [1, 2])
def test_rows_damaged_by_a_power_cut_are_found_after_the_restart(
    store: FeatureStore, cache: Path, monkeypatch: pytest.MonkeyPatch, num_files: int
) -> None:
    for seed in range(num_files):
        rows = put(store, 100, seed=seed)
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


def test_processes_may_build_one_cache_at_once(store: FeatureStore, cache: Path) -> None:
    rows = put(store, 2000)
    with ProcessPoolExecutor(4, FORK) as pool:
        found = list(pool.map(partial(load_and_look, store.url, cache), [rows.keys_N] * 4))
    assert found == [rows.features_ND.tobytes()] * 4
    assert len(list(cache.iterdir())) == 24


ENDS = np.array([0, 1, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1], np.uint64)


def index_of(hash_N, num_shards, owned):
    hash_N = np.unique(hash_N)
    bounds = np.searchsorted(shard_of_hash(hash_N, num_shards), np.arange(num_shards + 1))
    return HashIndex(owned, [hash_N[bounds[shard] : bounds[shard + 1]] for shard in owned], num_shards)


def check(index, asked_U, num_shards, owned):
    shard_U = shard_of_hash(asked_U, num_shards)
    asked_U, shard_U = asked_U[np.isin(shard_U, owned)], shard_U[np.isin(shard_U, owned)]
    place_U = index.places(asked_U, shard_U)
    assert place_U.min(initial=0) >= 0 and place_U.max(initial=0) < len(index)
    assert np.array_equal(index.hash_M[place_U] == asked_U, np.isin(asked_U, index.hash_M))


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40), st.sampled_from([1, 4, 16]))
def test_hashes_of_any_kind(numbers, num_shards):
    hash_N = np.array(numbers, np.uint64)
    owned = list(range(num_shards))
    asked_U = np.concatenate([hash_N, hash_N + np.uint64(1), hash_N - np.uint64(1), ENDS])
    check(index_of(hash_N, num_shards, owned), asked_U, num_shards, owned)


def test_hashes_that_crowd_in_one_bucket():
    hash_N = np.arange(3000, dtype=np.uint64) + np.uint64(1 << 40)
    check(index_of(hash_N, 4, [0, 1, 2, 3]), np.concatenate([hash_N, hash_N + np.uint64(3000), ENDS]), 4, [0, 1, 2, 3])
