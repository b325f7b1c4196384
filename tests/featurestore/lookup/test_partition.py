"""One rank's partition: the right row or none, missing and hidden keys, files in one matrix."""

from pathlib import Path

import numpy as np
import pytest

from featurestore import FeaturePartition, FeatureRows, FeatureStore, StoreInfo, to_bits
from featurestore.errors import (
    FeatureStoreError,
    MissingKeysError,
    SnapshotNotFoundError,
    StorageError,
    StoreNotFoundError,
)
from featurestore.keys import sampled, splitmix64
from featurestore.lookup import rowfiles


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dim", [1, 7, 8, 3000])
@pytest.mark.parametrize("threads", [1, 3])
def test_lookup_gives_the_rows_in_the_order_asked(
    tmp_path: Path, cache: Path, info: StoreInfo, make_rows, dtype: str, dim: int, threads: int
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


@pytest.mark.parametrize("memory_bytes", [1 << 40, 300 * 16])
def test_what_is_larger_than_half_of_the_memory_is_not_read_at_its_opening(
    store: FeatureStore, cache: Path, make_rows, memory_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(300, store.info)  # of 16 bytes
    store.put(rows)
    read: list[int] = []
    monkeypatch.setattr("featurestore.lookup.rowfiles.populate", lambda rows_MD: read.append(len(rows_MD)))
    monkeypatch.setattr("featurestore.lookup.rowfiles.physical_memory_bytes", lambda: memory_bytes)
    with FeaturePartition.load(store, cache_dir=cache) as partition:
        assert sum(read) == (300 if memory_bytes > 300 * 32 else 0)
        assert np.array_equal(partition.lookup(rows.keys_N).features_UD, rows.features_ND)


@pytest.mark.parametrize("wider_by", [0, 1])
def test_rows_are_the_same_touched_first_or_not(
    store: FeatureStore, cache: Path, make_rows, monkeypatch: pytest.MonkeyPatch, wider_by: int
) -> None:
    """Wide rows are touched before they are copied; narrow ones are copied faster as they are."""
    rows = make_rows(300, store.info)
    store.put(rows)
    touched = []
    touch_and_take = rowfiles._touch_and_take
    monkeypatch.setattr(rowfiles, "_touch_and_take", lambda *rest: touched.append(touch_and_take(*rest)))
    monkeypatch.setattr(rowfiles, "_TOUCHED_BYTES", store.info.row_bytes + wider_by)
    opened = FeaturePartition.load(store, cache_dir=cache)
    assert np.array_equal(opened.lookup(rows.keys_N).features_UD, rows.features_ND)
    assert bool(touched) == (wider_by == 0)


def test_a_lookup_never_gives_a_wrong_row(store: FeatureStore, cache: Path, make_rows) -> None:
    rows = make_rows(300, store.info)
    held = set(rows.keys_N.tolist())
    store.put(rows)
    neighbours = [key_of_hash(int(h) + step) for h in splitmix64(rows.keys_N) for step in (-1, 1)]
    random = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 3000).tolist()
    close = [key + step for key in rows.keys_N[:200].tolist() for step in (-1, 1)]
    extremes = [0, -1, 2**63 - 1, -(2**63), key_of_hash(0), key_of_hash(2**64 - 1)]
    asked = np.array([k for k in [*neighbours, *random, *close, *extremes] if k not in held] + rows.keys_N.tolist())
    with FeaturePartition.load(store, cache_dir=cache, missing="zeros") as partition:
        found = partition.lookup(asked)
        assert found.missing_U[:-300].all() and not found.missing_U[-300:].any()
        assert not found.features_UD[:-300].any()
        assert np.array_equal(found.features_UD[-300:], rows.features_ND)


def key_of_hash(hash_: int) -> int:
    """The key whose splitmix64 is `hash_` (mod 2**64), as a signed number."""
    mask = 2**64 - 1

    def unshift(x: int, bits: int) -> int:
        result = x
        for _ in range(64 // bits + 1):
            result = x ^ (result >> bits)
        return result & mask

    value = unshift(hash_ & mask, 31) * pow(0x94D049BB133111EB, -1, 2**64) & mask
    value = unshift(value, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) & mask
    value = (unshift(value, 30) - 0x9E3779B97F4A7C15) & mask
    return value - 2**64 if value >= 2**63 else value


def test_policy_error_names_some_keys_and_the_count(store: FeatureStore, cache: Path, make_rows) -> None:
    rows = make_rows(10, store.info)
    store.put(rows)
    with FeaturePartition.load(store, cache_dir=cache) as partition:
        with pytest.raises(MissingKeysError, match=r"6 keys have no feature in snapshot 1 .*: 1, 2, 3, 4, 5, …"):
            partition.lookup([1, 2, 3, int(rows.keys_N[0]), 4, 5, 6])
        partition.lookup(rows.keys_N)
        assert partition.missing_count == 0


@pytest.mark.parametrize("policy", ["zeros", "learned"])
def test_policies_zeros_and_learned_give_zeros_a_mask_and_a_count(
    store: FeatureStore, cache: Path, make_rows, policy: str
) -> None:
    rows = make_rows(10, store.info)
    store.put(rows)
    store.delete(rows.keys_N[3:4])
    with FeaturePartition.load(store, cache_dir=cache, missing=policy) as partition:
        out = np.full((11, 8), 7, np.uint16)
        found = partition.lookup([*rows.keys_N, 5], out=out)
        assert np.flatnonzero(found.missing_U).tolist() == [3, 10]
        assert not out[[3, 10]].any() and np.array_equal(out[:3], rows.features_ND[:3])
        assert partition.missing_count == 2
        partition.lookup([5, 5])
        assert partition.missing_count == 4


@pytest.mark.parametrize("block_rows", [1, 4, 11, 100])
def test_blocks_are_a_lookup_in_pieces(store: FeatureStore, cache: Path, make_rows, block_rows: int) -> None:
    rows = make_rows(10, store.info)
    store.put(rows)
    keys = [*rows.keys_N[:6], 5, *rows.keys_N[6:]]
    with FeaturePartition.load(store, cache_dir=cache, missing="zeros") as partition:
        whole = partition.lookup(keys)
        blocks = [
            (block.features_UD.copy(), block.missing_U) for block in partition.lookup_blocks(np.array(keys), block_rows)
        ]
        assert [len(features) for features, _ in blocks[:-1]] == [min(block_rows, 11)] * (len(blocks) - 1)
        assert np.array_equal(np.concatenate([features for features, _ in blocks]), whole.features_UD)
        assert np.array_equal(np.concatenate([missing for _, missing in blocks]), whole.missing_U)
        assert partition.missing_count == 2
        assert list(partition.lookup_blocks(np.empty(0, np.int64), block_rows)) == []
    with FeaturePartition.load(store, cache_dir=cache) as partition, pytest.raises(MissingKeysError, match="1 key"):
        next(partition.lookup_blocks(np.array(keys), block_rows))


def test_an_open_partition_keeps_its_snapshot(store: FeatureStore, cache: Path, make_rows) -> None:
    rows = make_rows(50, store.info, seed=1)
    store.put(rows)
    with FeaturePartition.load(store, cache_dir=cache) as partition:
        store.put(make_rows(50, store.info, seed=2))
        store.delete(rows.keys_N)
        for path in cache.iterdir():
            path.unlink()  # mapped files live on
        assert np.array_equal(partition.lookup(rows.keys_N).features_UD, rows.features_ND)
    with FeaturePartition.load(store, cache_dir=cache, version=1) as old:
        assert np.array_equal(old.lookup(rows.keys_N).features_UD, rows.features_ND)
    with FeaturePartition.load(store, cache_dir=cache, missing="zeros") as new:
        assert new.num_rows == 0 and new.lookup(rows.keys_N).missing_U.all()
    with pytest.raises(SnapshotNotFoundError):
        FeaturePartition.load(store, cache_dir=cache, version=9)


def test_an_empty_store_serves_nothing(store: FeatureStore, cache: Path) -> None:
    with FeaturePartition.load(store, cache_dir=cache, missing="learned") as partition:
        assert (partition.num_rows, partition.snapshot_version) == (0, 0)
        found = partition.lookup([1, 2])
        assert found.missing_U.all() and not found.features_UD.any()
    assert not cache.exists()


def test_wrong_arguments_are_named(store: FeatureStore, cache: Path, tmp_path: Path, make_rows) -> None:
    rows = make_rows(3, store.info)
    store.put(rows)
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
    for out in (np.empty((3, 7), np.uint16), np.empty((3, 8), np.float16), np.empty((8, 3), np.uint16).T):
        with pytest.raises(ValueError, match="out is"):
            partition.lookup(rows.keys_N, out=out)
    partition.close()
    with pytest.raises(FeatureStoreError, match="closed"):
        partition.lookup(rows.keys_N)


def test_rows_outlive_the_partition(store: FeatureStore, cache: Path, make_rows) -> None:
    rows = make_rows(3, store.info)
    store.put(rows)
    partition = FeaturePartition.load(store, cache_dir=cache)
    first = next(partition.rows(1))
    partition.close()
    assert first.any()  # an array that looks into the files keeps them mapped


def test_rows_wider_than_pages_and_groups(tmp_path: Path, cache: Path, info: StoreInfo) -> None:
    info = info.model_copy(update={"dim": 9001, "dtype": "float32", "num_shards": 2})
    values = np.random.default_rng(0).standard_normal((700, 9001)).astype(np.float32)
    store = FeatureStore.create(tmp_path / "wide", info)
    rows = FeatureRows.of([f"{i}" for i in range(700)], to_bits(values, "float32"))
    store.put(rows)
    with FeaturePartition.load(store, cache_dir=cache, threads=2) as partition:
        assert np.array_equal(partition.lookup(rows.keys_N).features_UD, values)
    assert np.array_equal(store.snapshot().get(rows.keys_N[::97]), values[::97])


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_hidden_keys_have_no_feature_until_the_end(store: FeatureStore, cache: Path, make_rows, num_ranks: int) -> None:
    rows = make_rows(400, store.info)
    store.put(rows)
    for rank in range(num_ranks):
        with FeaturePartition.load(store, rank, num_ranks, cache_dir=cache, missing="zeros") as partition:
            owned = partition.owns(rows.keys_N)
            keys_U, features_UD = rows.keys_N[owned], rows.features_ND[owned]
            partition.hide(0.3, seed=5)
            found, hidden_U = partition.lookup(keys_U), sampled(keys_U, 0.3, seed=5)
            assert 0 < hidden_U.sum() < len(hidden_U)
            assert (found.missing_U == hidden_U).all()
            assert not found.features_UD[hidden_U].any()
            assert np.array_equal(found.features_UD[~hidden_U], features_UD[~hidden_U])
            assert partition.missing_count == hidden_U.sum()
            assert partition.contains(keys_U).all()
            partition.hide(0)
            assert np.array_equal(partition.lookup(keys_U).features_UD, features_UD)


def test_nothing_can_be_hidden_where_missing_keys_are_errors(store: FeatureStore, cache: Path, make_rows) -> None:
    store.put(make_rows(10, store.info))
    with FeaturePartition.load(store, cache_dir=cache) as partition:
        with pytest.raises(ValueError, match="missing=zeros or learned"):
            partition.hide(0.1)
        partition.hide(0)
    with (
        FeaturePartition.load(store, cache_dir=cache, missing="zeros") as partition,
        pytest.raises(ValueError, match=r"share=1\.5"),
    ):
        partition.hide(1.5)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_contains_tells_the_rows_of_this_rank(store: FeatureStore, cache: Path, make_rows, num_ranks: int) -> None:
    rows = make_rows(100, store.info)
    store.put(rows)
    store.delete(rows.keys_N[:10])
    asked = np.concatenate([rows.keys_N, np.arange(50)])
    seen = np.zeros(150, np.int64)
    for rank in range(num_ranks):
        with FeaturePartition.load(store, rank, num_ranks, cache_dir=cache) as partition:
            held = partition.contains(asked)
            assert not (held & ~partition.owns(asked)).any()
            seen += held
    assert seen.tolist() == [0] * 10 + [1] * 90 + [0] * 50


def test_an_empty_partition_contains_nothing(store: FeatureStore, cache: Path) -> None:
    with FeaturePartition.load(store, cache_dir=cache) as partition:
        assert not partition.contains([1, 2]).any()
