"""A rank's partition and its cache files: the right rows or none, in bounded memory; what is damaged is built again."""

import errno
import os
import re
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from featurestore import FeaturePartition, FeatureRows, FeatureStore, StoreInfo, errors, owner_of, shard_of
from featurestore.format.datafile import DataFile, FileMemory
from featurestore.keys import HashIndex, keys_of_uris, shard_of_hash
from featurestore.lookup.cache import default_cache_dir, open_or_build, prune
from featurestore.problems import Problem
from tests.cli import ran
from tests.featurestore.conftest import make_rows, put
from tests.featurestore.contents import flip
from tests.fuse import FORK
from tests.raised import raises, told


def check_served(store: FeatureStore, cache: Path, rows: FeatureRows) -> None:
    with FeaturePartition.load(store, cache_dir=cache) as partition:
        np.testing.assert_array_equal(partition.lookup(rows.keys_N).features_UD, rows.features_ND)


def files_of(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}


def names(cache: Path) -> set[str]:
    return set(files_of(cache))


def file_of(cache: Path, suffix: str, shard: int = 3) -> Path:
    return next(cache.glob(f"shard-{shard:04d}-*{suffix}"))


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def age(paths: Iterable[Path], days: float) -> None:
    then_s = time.time() - days * 24 * 3600
    for path in paths:
        os.utime(path, (then_s, then_s))


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
        where = f"snapshot 2 of {store.url}"
        with raises(errors.MissingKeysError, Problem.NO_FEATURE, number=6, where=where, value="1, 2, 3, 4, 5, …"):
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
    missing = raises(errors.MissingKeysError, Problem.NO_FEATURE, number=1, have="key has", value=5)
    with FeaturePartition.load(store, cache_dir=cache) as partition, missing:
        next(partition.lookup_blocks(np.array(keys), block_rows))


def test_wrong_arguments_are_named(store: FeatureStore, cache: Path, tmp_path: Path, rows: FeatureRows) -> None:
    with pytest.raises(ValueError, match=told(Problem.RANK_TOO_HIGH, value=2, limit=2)):
        FeaturePartition.load(store, 2, 2, cache)
    with pytest.raises(ValueError, match=told(Problem.UNKNOWN_POLICY, value="skip")):
        FeaturePartition.load(store, cache_dir=cache, missing="skip")  # type: ignore[arg-type]
    with raises(errors.StoreNotFoundError, Problem.NO_STORE, where=tmp_path / "nothing"):
        FeaturePartition.load(tmp_path / "nothing", cache_dir=cache)
    (tmp_path / "file").write_bytes(b"")
    with raises(errors.StorageError, Problem.CANNOT_USE_CACHE, where=tmp_path / "file"):
        FeaturePartition.load(store, cache_dir=tmp_path / "file")
    partition = FeaturePartition.load(store, cache_dir=cache)
    with pytest.raises(ValueError, match=told(Problem.CANNOT_HIDE_IMAGES)):
        partition.hide(True)
    for out in (np.empty((3, 7), np.uint16), np.empty((3, 8), np.float16), np.empty((8, 3), np.uint16).T):
        with pytest.raises(ValueError, match=told(Problem.OUT_DOES_NOT_FIT, value=out.shape, dtype=out.dtype)):
            partition.lookup(rows.keys_N[:3], out=out)
    partition.close()
    with raises(errors.FeatureStoreError, Problem.PARTITION_CLOSED):
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
    with raises(errors.SnapshotNotFoundError, Problem.NO_SNAPSHOT, where=store.url, value=9):
        FeaturePartition.load(store, cache_dir=cache, version=9)


def load_and_look(url: str, cache: Path, keys_U: np.ndarray) -> bytes:
    with FeaturePartition.load(url, cache_dir=cache) as partition:
        return partition.lookup(keys_U).features_UD.tobytes()


def test_keys_of_other_ranks_are_not_searched(store: FeatureStore, cache: Path, rows: FeatureRows) -> None:
    """The index walks to its end for each of them: of a million images, two ranks evaluated for ten minutes."""
    with FeaturePartition.load(store, 1, 3, cache) as partition:
        with patch.object(HashIndex, "places", autospec=True, side_effect=HashIndex.places) as places:
            found = partition.contains(rows.keys_N)
        _, _, shard_O = places.call_args.args
        assert found.sum() == len(shard_O) == partition.num_rows > 0
        assert (owner_of(shard_O, 3) == 1).all()


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
                with raises(errors.MissingKeysError, Problem.SHARD_NOT_OWNED, owner=f"rank {rank} of {num_ranks}"):
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


@pytest.mark.parametrize("num_files", [1, 2])
def test_rows_damaged_by_a_power_cut_are_found_after_the_restart(
    store: FeatureStore, cache: Path, monkeypatch: pytest.MonkeyPatch, num_files: int
) -> None:
    for seed in range(num_files):
        rows = put(store, 100, seed=seed)
    check_served(store, cache, rows)
    before, victim = files_of(cache), file_of(cache, "rows.bin")
    whole = victim.read_bytes()
    victim.write_bytes(bytes(len(whole)))  # the size is right
    monkeypatch.setattr("featurestore.lookup.cache.current_boot", lambda: "the next start")
    for _ in range(2):
        check_served(store, cache, rows)
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


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40), st.sampled_from([1, 4, 16]))
@example(range(1 << 40, (1 << 40) + 3000), 4)  # which crowd in one bucket
def test_hashes_of_any_kind(numbers: Sequence[int], num_shards: int) -> None:
    hash_N = np.unique(np.array(numbers, np.uint64))
    ends = np.searchsorted(shard_of_hash(hash_N, num_shards), np.arange(1, num_shards))
    index = HashIndex(list(range(num_shards)), np.split(hash_N, ends), num_shards)
    asked_U = np.concatenate([hash_N, hash_N + np.uint64(1), hash_N - np.uint64(1), hash_N + np.uint64(3000), ENDS])
    place_U = index.places(asked_U, shard_of_hash(asked_U, num_shards))
    assert place_U.min(initial=0) >= 0 and place_U.max(initial=0) < len(index)
    assert np.array_equal(index.hash_M[place_U] == asked_U, np.isin(asked_U, index.hash_M))


def test_keys_that_change_are_found(store: FeatureStore, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two readings: which row wins is decided before the digest of a file is known."""
    put(store, 200)
    put(store, 100, seed=1)
    read = DataFile.read

    def other_keys(file: DataFile, columns: list[str]) -> object:
        table = read(file, columns)
        return table.take([1, 0, *range(2, len(table))])

    monkeypatch.setattr(DataFile, "read", other_keys)
    with raises(errors.CorruptFileError, Problem.CHANGED_WHILE_READ):
        FeaturePartition.load(store, cache_dir=cache)
    assert names(cache) == set()


MEASURE = """
import sys
from pathlib import Path
from featurestore import FeatureStore
from featurestore.lookup import cache
cache._MEMORY_BYTES = int(sys.argv[3])
readers = [FeatureStore.open(sys.argv[1]).snapshot().shard_reader(shard) for shard in range(2)]
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
cache.open_or_build(readers[:1], Path(sys.argv[2], "warm"), 1)
before = peak()
cache.open_or_build(readers[1:], Path(sys.argv[2], "measured"), 4)
print(peak() - before, file=sys.stdout)
"""


@pytest.mark.long
def test_a_shard_of_many_deltas_is_built_in_the_memory_of_one_file(tmp_path: Path, info: StoreInfo) -> None:
    """Peak of the resident memory of another process; the first shard, a tiny one, warms it up."""
    big = info.model_copy(update={"dim": 4096, "num_shards": 2})
    store = FeatureStore.create(tmp_path / "store", big)
    drawn = [f"{number}.jpg" for number in range(4000)]
    shard_N = shard_of(keys_of_uris(drawn), 2)
    other, in_shard = drawn[shard_N.argmin()], [uri for uri, shard in zip(drawn, shard_N, strict=True) if shard == 1]
    rng = np.random.default_rng(0)
    store.put(FeatureRows.of([other], np.ones((1, 4096), np.uint16)))
    for part in range(12):
        uris = in_shard[100 * part : 100 * part + 800]
        store.put(FeatureRows.of(uris, rng.integers(0, 1 << 14, (len(uris), 4096), np.uint16)))
    files = store.snapshot().manifest.files(1)
    largest, total = max(entry.bytes for entry in files), sum(entry.bytes for entry in files)
    assert total > 8 * largest
    peak = int(ran(sys.executable, "-c", MEASURE, store.url, tmp_path, 1 << 20).stdout) * 1024
    assert peak < largest + (28 << 20) < total / 2, f"{peak} for {largest} of {total} bytes"


def test_threads_together_stay_below_the_limit(
    store: FeatureStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(3):
        put(store, 800, seed=seed)
    snapshot = store.snapshot()
    largest = max(entry.bytes for files in snapshot.manifest.shards.values() for entry in files)
    lent: list[FileMemory] = []
    monkeypatch.setattr("featurestore.lookup.cache._MEMORY_BYTES", 2 * largest)
    monkeypatch.setattr("featurestore.lookup.cache.FileMemory", lambda limit: lent.append(FileMemory(limit)) or lent[0])
    open_or_build([snapshot.shard_reader(shard) for shard in range(8)], cache, 8)
    assert len(lent) == 1 and largest <= lent[0].peak_bytes <= 2 * largest


def test_memory_is_lent_reused_and_limited() -> None:
    memory = FileMemory(100)
    with memory.borrow(40) as view:
        view[:] = b"x" * 40
    with memory.borrow(30) as view:
        assert bytes(view) == b"x" * 30  # the same buffer: no fresh one was made
    with memory.borrow(50), memory.borrow(50):
        assert memory.peak_bytes == 100
        waiter = threading.Thread(target=lambda: memory.borrow(60).__enter__())
        waiter.start()
        waiter.join(0.05)
        assert waiter.is_alive()  # until both are back: 50 and 60 are too much
    waiter.join(5)
    assert not waiter.is_alive() and memory.peak_bytes == 100
    with FileMemory(10).borrow(1000) as view:
        assert len(view) == 1000  # a single file may be larger than the limit
    large = FileMemory(1 << 50)
    with pytest.raises(MemoryError), large.borrow(1 << 50):
        pass  # what is not there is not lent
    assert can_borrow(large, 10) and large.peak_bytes == 10


def can_borrow(memory: FileMemory, size_bytes: int) -> bool:
    """Whether it is lent within seconds."""
    thread = threading.Thread(target=lambda: memory.borrow(size_bytes).__enter__(), daemon=True)
    thread.start()
    thread.join(5)
    return not thread.is_alive()


@pytest.mark.parametrize("plain", [True, False])
def test_a_full_disk_gives_the_memory_back_to_the_other_threads(
    store: FeatureStore, cache: Path, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    for seed in range(1 if plain else 2):
        put(store, 50, seed=seed)
    lent: list[FileMemory] = []
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr("featurestore.lookup.cache.FileMemory", lambda limit: lent.append(FileMemory(limit)) or lent[0])
    monkeypatch.setattr("featurestore.lookup.cache.append_rows" if plain else "os.pwrite", full)
    with raises(errors.StorageError, Problem.CANNOT_USE_CACHE, where=cache, reason=re.compile("No space")) as caught:
        open_or_build([store.snapshot().shard_reader(3)], cache, threads=1)
    assert caught.value.__cause__ is not None  # as in a thread whose error waits to be raised
    assert can_borrow(lent[0], lent[0].limit_bytes)


def test_files_of_an_older_snapshot_go_when_nobody_has_opened_them_for_a_day(store: FeatureStore, cache: Path) -> None:
    put(store, 100)
    FeaturePartition.load(store, cache_dir=cache).close()
    old = names(cache)
    put(store, 100, seed=1)
    FeaturePartition.load(store, cache_dir=cache).close()
    assert names(cache) > old and len(names(cache)) == 48
    age((seal for seal in cache.glob("*.json") if seal.name in old), 1.1)
    FeaturePartition.load(store, version=1, cache_dir=cache).close()  # opened: young again
    FeaturePartition.load(store, cache_dir=cache).close()
    assert names(cache) > old
    age(cache.glob("*.json"), 1.1)
    with FeaturePartition.load(store, version=1, cache_dir=cache, missing="zeros") as partition:
        assert names(cache) == old  # the newer ones are as old: a run of the newest snapshot builds them again
        age(cache.glob("*.json"), 1.1)
        FeaturePartition.load(store, cache_dir=cache).close()
        assert not names(cache) & old
        rows = make_rows(100, store.info)
        np.testing.assert_array_equal(partition.lookup(rows.keys_N).features_UD, rows.features_ND)


def test_files_of_other_stores_and_shards_go_after_a_month(tmp_path: Path, info: StoreInfo, cache: Path) -> None:
    kept = []
    for name in ("a", "b"):
        store = FeatureStore.create(tmp_path / name, info)
        store.put(make_rows(100, info, seed=ord(name)))
        FeaturePartition.load(store, cache_dir=cache).close()
        kept.append(store)
    assert len(names(cache)) == 48
    for days, left in ((29, 48), (31, 24)):
        age(cache.glob(f"*-{kept[0].info.store_id[:8]}-*.json"), days)
        FeaturePartition.load(kept[1], cache_dir=cache).close()
        assert len(names(cache)) == left
    age(cache.glob("*.json"), 29)
    FeaturePartition.load(kept[1], 0, 8, cache_dir=cache).close()  # other ranks' shards
    assert len(names(cache)) == 24


def test_leftovers_of_killed_builds_go_after_a_day(store: FeatureStore, cache: Path) -> None:
    put(store, 100)
    FeaturePartition.load(store, cache_dir=cache).close()
    before = names(cache)
    for name in (".tmp-old", ".tmp-new", "shard-0001-x-y.rows.bin", "shard-0001-x-z.rows.bin", "mine.txt"):
        (cache / name).write_bytes(b"x")
    age((cache / name for name in (".tmp-old", "shard-0001-x-y.rows.bin", "mine.txt")), 1.1)
    FeaturePartition.load(store, cache_dir=cache).close()
    assert names(cache) - before == {".tmp-new", "shard-0001-x-z.rows.bin", "mine.txt"}


def test_a_file_removed_by_another_rank_does_not_keep_the_others(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    for number in range(3):
        (cache / f".tmp-{number}").touch()
    age(cache.iterdir(), 2)
    listed = [*os.scandir(cache)]
    Path(listed[0].path).unlink()
    with monkeypatch.context() as patch:  # from Python 3.13 on, Path.iterdir is made of it too
        patch.setattr("featurestore.lookup.cache.os.scandir", lambda _: listed)
        prune(cache, set())
    assert names(cache) == set()


def test_files_opened_while_they_are_removed_stay(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    for suffix in ("keys.npy", "rows.bin", "json"):
        (cache / f"shard-0001-store-old.{suffix}").write_bytes(b"x")
    seal = cache / "shard-0001-store-old.json"
    age([seal], 2)
    rename = Path.rename

    def open_first(path: Path, target: Path) -> Path:
        if path == seal:
            os.utime(seal)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", open_first)
    prune(cache, {"shard-0001-store-new"})
    assert len(names(cache)) == 3
    monkeypatch.undo()
    age([seal], 2)
    prune(cache, {"shard-0001-store-new"})
    assert names(cache) == set()


def test_a_read_only_cache_is_used_alone(store: FeatureStore, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = put(store, 100)
    check_served(store, cache, rows)
    store.storage.delete("data")
    age(cache.glob("*.json"), 1.1)
    monkeypatch.setattr("featurestore.lookup.cache.os.utime", Mock(side_effect=PermissionError("not yours")))
    check_served(store, cache, rows)


def test_the_default_is_a_users_folder(store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home is told so."""
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "xdg"))
    put(store, 3)
    FeaturePartition.load(store).close()
    assert list((tmp_path / "xdg" / "crossmedia" / "features").glob("*.rows.bin"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    with raises(errors.StorageError, Problem.NO_HOME_FOLDER):
        default_cache_dir()


OTHER = 12_345
IS_ROOT = os.geteuid() == 0
GiveAway = Callable[[Path], None]


@pytest.fixture
def give_away(monkeypatch: pytest.MonkeyPatch) -> GiveAway:
    """Give a file or folder to another user; where this one may not, it only looks so."""
    if IS_ROOT:
        return lambda path: os.chown(path, OTHER, OTHER, follow_symlinks=False)
    given: set[Path] = set()
    real = Path.lstat, Path.stat

    def forged(path: Path, look: Callable[[Path], os.stat_result]) -> os.stat_result:
        found = look(path)
        return os.stat_result((*found[:4], OTHER, *found[5:])) if path in given else found

    monkeypatch.setattr(Path, "lstat", lambda path: forged(path, real[0]))
    monkeypatch.setattr(Path, "stat", lambda path, **options: forged(path, lambda each: real[1](each, **options)))
    return given.add


def test_folder_and_files_are_for_their_user_alone(store: FeatureStore, cache: Path, rows: FeatureRows) -> None:
    """A folder that others may only read stays as it is."""
    cache.mkdir()
    cache.chmod(0o755)
    before = os.umask(0)
    try:
        check_served(store, cache, rows)
        check_served(store, cache / "below", rows)
    finally:
        os.umask(before)
    assert (mode_of(cache), mode_of(cache / "below")) == (0o755, 0o700)
    assert {mode_of(path) for path in [*cache.glob("shard*"), *(cache / "below").iterdir()]} == {0o600}


@pytest.mark.parametrize("flaw", ["another user's", 0o777, 0o775])
def test_a_folder_into_which_others_can_write_is_refused(
    store: FeatureStore, cache: Path, rows: FeatureRows, give_away: GiveAway, flaw: str | int
) -> None:
    check_served(store, cache, rows)
    give_away(cache) if isinstance(flaw, str) else cache.chmod(flaw)
    before = {path: (path.stat().st_mtime_ns, mode_of(path)) for path in [cache, *cache.iterdir()]}
    with raises(errors.StorageError, Problem.OTHERS_CAN_WRITE, where=cache):
        check_served(store, cache, rows)
    assert {path: (path.stat().st_mtime_ns, mode_of(path)) for path in [cache, *cache.iterdir()]} == before


@pytest.mark.parametrize(
    ("flaw", "suffix"),
    [("another user's", ".rows.bin"), ("a link", ".keys.npy"), (0o666, ".json"), (0o620, ".rows.bin")],
)
def test_a_file_that_others_can_change_is_built_again(
    store: FeatureStore, cache: Path, rows: FeatureRows, give_away: GiveAway, flaw: str | int, suffix: str
) -> None:
    """Put there while the folder was open to others."""
    check_served(store, cache, rows)
    place = file_of(cache, suffix)
    number = place.stat().st_ino
    flip(place) if suffix == ".rows.bin" else None
    if isinstance(flaw, int):
        place.chmod(flaw)
    elif flaw == "a link":
        place.symlink_to(shutil.move(place, cache.with_name("elsewhere")))
    else:
        give_away(place)
    check_served(store, cache, rows)
    assert not place.is_symlink() and (place.stat().st_ino != number or not IS_ROOT) and mode_of(place) == 0o600


def test_rows_that_were_changed_since_the_last_opening_are_built_again(
    store: FeatureStore, cache: Path, rows: FeatureRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a restart; also where the time of writing was set back."""
    check_served(store, cache, rows)
    place = file_of(cache, ".rows.bin")
    times = place.stat().st_atime_ns, place.stat().st_mtime_ns
    flip(place)
    os.utime(place, ns=times)
    check_served(store, cache, rows)
    forged = place.with_name("forged")
    forged.write_bytes(bytes(place.stat().st_size))
    forged.chmod(0o600)
    forged.rename(place)
    check_served(store, cache, rows)
    read: list[Path] = []
    monkeypatch.setattr("featurestore.lookup.cache.digest_of_file", lambda path: read.append(path) or "")
    check_served(store, cache, rows)
    assert read == []  # what has not changed is not read through again


def test_a_seal_counts_for_the_files_it_was_made_for_alone(store: FeatureStore, cache: Path, rows: FeatureRows) -> None:
    """All three files of another snapshot, under the name of this one: each fits the others, none the store."""
    check_served(store, cache, rows)
    newer = put(store, 200, seed=1)
    old = {path.name.partition(".")[2]: path for path in cache.glob("shard-0003-*")}
    check_served(store, cache, newer)
    for suffix, path in old.items():
        new = next(each for each in cache.glob(f"shard-0003-*.{suffix}") if each != path)
        shutil.copy(path, new)
    check_served(store, cache, newer)
