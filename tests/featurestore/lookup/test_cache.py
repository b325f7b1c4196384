"""Cache files: right rows of any mix of files, bounded memory, damage and files of other users found, old ones go."""

import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from featurestore import FeaturePartition, FeatureRows, FeatureStore, StoreInfo, shard_of
from featurestore.errors import CorruptFileError, StorageError
from featurestore.format.datafile import DataFile, FileMemory
from featurestore.keys import keys_of_uris
from featurestore.lookup.cache import default_cache_dir, open_or_build, prune
from tests.featurestore.conftest import make_rows, put

DAY_S = 24 * 3600


def age(path: Path, days: float) -> None:
    then_s = time.time() - days * DAY_S
    os.utime(path, (then_s, then_s))


def names(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()}


def test_keys_that_change_are_found(store: FeatureStore, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two readings: which row wins is decided before the digest of a file is known."""
    put(store, 200)
    put(store, 100, seed=1)
    read = DataFile.read

    def other_keys(file: DataFile, columns: list[str]) -> object:
        table = read(file, columns)
        return table.take([1, 0, *range(2, len(table))])

    monkeypatch.setattr(DataFile, "read", other_keys)
    with pytest.raises(CorruptFileError, match="changed while it was read"):
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
    command = [sys.executable, "-c", MEASURE, store.url, str(tmp_path), str(1 << 20)]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    peak = int(done.stdout) * 1024
    assert peak < largest + (28 << 20) < total / 2, f"{peak} for {largest} of {total} bytes"


def test_threads_together_stay_below_the_limit(tmp_path: Path, info: StoreInfo, cache: Path) -> None:
    store = FeatureStore.create(tmp_path / "store", info)
    for seed in range(3):
        store.put(make_rows(800, info, seed=seed))
    snapshot = store.snapshot()
    largest = max(entry.bytes for files in snapshot.manifest.shards.values() for entry in files)
    lent: list[FileMemory] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featurestore.lookup.cache._MEMORY_BYTES", 2 * largest)
        patch.setattr("featurestore.lookup.cache.FileMemory", lambda limit: lent.append(FileMemory(limit)) or lent[0])
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

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("featurestore.lookup.cache.FileMemory", lambda limit: lent.append(FileMemory(limit)) or lent[0])
    monkeypatch.setattr("featurestore.lookup.cache.append_rows" if plain else "os.pwrite", full)
    with pytest.raises(StorageError, match="No space left") as caught:
        open_or_build([store.snapshot().shard_reader(3)], cache, threads=1)
    assert caught.value.__cause__ is not None  # as in a thread whose error waits to be raised
    assert can_borrow(lent[0], lent[0].limit_bytes)


@pytest.mark.parametrize("suffix", ["keys.npy", "json"])
def test_a_flipped_bit_in_a_cache_file_is_never_served(store: FeatureStore, cache: Path, suffix: str) -> None:
    """Keys and seal are checked at each opening; rows at the first one after the machine has started."""
    rows = put(store, 60)
    served(store, cache, rows)
    path = file_of(cache, suffix)
    size = path.stat().st_size
    for place in range(0, size, max(1, size // 8)):
        flip(path, place)
        np.testing.assert_array_equal(served(store, cache, rows), rows.features_ND)


def test_files_of_an_older_snapshot_go_when_nobody_has_opened_them_for_a_day(store: FeatureStore, cache: Path) -> None:
    put(store, 100)
    FeaturePartition.load(store, cache_dir=cache).close()
    old = names(cache)
    put(store, 100, seed=1)
    FeaturePartition.load(store, cache_dir=cache).close()
    assert names(cache) > old and len(names(cache)) == 48
    for seal in cache.glob("*.json"):
        if seal.name in old:
            age(seal, 1.1)
    FeaturePartition.load(store, version=1, cache_dir=cache).close()  # opened: young again
    FeaturePartition.load(store, cache_dir=cache).close()
    assert names(cache) > old
    for seal in cache.glob("*.json"):
        age(seal, 1.1)
    with FeaturePartition.load(store, version=1, cache_dir=cache, missing="zeros") as partition:
        assert names(cache) == old  # the newer ones are as old: a run of the newest snapshot builds them again
        for seal in cache.glob("*.json"):
            age(seal, 1.1)
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
        for seal in cache.glob(f"*-{kept[0].info.store_id[:8]}-*.json"):
            age(seal, days)
        FeaturePartition.load(kept[1], cache_dir=cache).close()
        assert len(names(cache)) == left
    for seal in cache.glob("*.json"):
        age(seal, 29)
    FeaturePartition.load(kept[1], 0, 8, cache_dir=cache).close()  # other ranks' shards
    assert len(names(cache)) == 24


def test_leftovers_of_killed_builds_go_after_a_day(store: FeatureStore, cache: Path) -> None:
    put(store, 100)
    FeaturePartition.load(store, cache_dir=cache).close()
    before = names(cache)
    for name in (".tmp-old", ".tmp-new", "shard-0001-x-y.rows.bin", "shard-0001-x-z.rows.bin", "mine.txt"):
        (cache / name).write_bytes(b"x")
    for name in (".tmp-old", "shard-0001-x-y.rows.bin", "mine.txt"):
        age(cache / name, 1.1)
    FeaturePartition.load(store, cache_dir=cache).close()
    assert names(cache) - before == {".tmp-new", "shard-0001-x-z.rows.bin", "mine.txt"}


def test_a_file_removed_by_another_rank_does_not_keep_the_others(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    for number in range(3):
        (cache / f".tmp-{number}").touch()
        age(cache / f".tmp-{number}", 2)
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
    age(seal, 2)
    rename = Path.rename

    def open_first(path: Path, target: Path) -> Path:
        if path == seal:
            os.utime(seal)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", open_first)
    prune(cache, {"shard-0001-store-new"})
    assert len(names(cache)) == 3
    monkeypatch.undo()
    age(seal, 2)
    prune(cache, {"shard-0001-store-new"})
    assert names(cache) == set()


def test_a_read_only_cache_is_used_alone(store: FeatureStore, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = put(store, 100)
    served(store, cache, rows)
    store.storage.delete("data")
    for seal in cache.glob("*.json"):
        age(seal, 1.1)

    def refuse(*_: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr("featurestore.lookup.cache.os.utime", refuse)
    np.testing.assert_array_equal(served(store, cache, rows), rows.features_ND)


def test_the_default_is_a_users_folder(store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home is told so."""
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "xdg"))
    put(store, 3)
    FeaturePartition.load(store).close()
    assert list((tmp_path / "xdg" / "crossmedia" / "features").glob("*.rows.bin"))

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(StorageError, match=r"no home folder.*XDG_CACHE_HOME"):
        default_cache_dir()


OTHER = 12_345
IS_ROOT = os.geteuid() == 0


@pytest.fixture
def give_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
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


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def served(store: FeatureStore, cache: Path, rows: FeatureRows) -> np.ndarray:
    with FeaturePartition.load(store, cache_dir=cache) as partition:
        return partition.lookup(rows.keys_N).features_UD


def file_of(cache: Path, suffix: str, shard: int = 3) -> Path:
    return next(cache.glob(f"shard-{shard:04d}-*{suffix}"))


def flip(path: Path, place: int = 100) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_folder_and_files_are_for_their_user_alone(store: FeatureStore, cache: Path, rows: FeatureRows) -> None:
    """A folder that others may only read stays as it is."""
    cache.mkdir()
    cache.chmod(0o755)
    before = os.umask(0)
    try:
        np.testing.assert_array_equal(served(store, cache, rows), rows.features_ND)
        served(store, cache / "below", rows)
    finally:
        os.umask(before)
    assert (mode_of(cache), mode_of(cache / "below")) == (0o755, 0o700)
    assert {mode_of(path) for path in [*cache.glob("shard*"), *(cache / "below").iterdir()]} == {0o600}


@pytest.mark.parametrize(
    ("flaw", "told"),
    [("another user's", "data.cache_dir"), (0o777, "data.cache_dir.*chmod 700"), (0o775, "data.cache_dir.*chmod 700")],
)
def test_a_folder_into_which_others_can_write_is_refused(
    store: FeatureStore, cache: Path, rows: FeatureRows, give_away: Callable[[Path], None], flaw: str | int, told: str
) -> None:
    served(store, cache, rows)
    give_away(cache) if isinstance(flaw, str) else cache.chmod(flaw)
    before = {path: (path.stat().st_mtime_ns, mode_of(path)) for path in [cache, *cache.iterdir()]}
    with pytest.raises(StorageError, match=f"can write into the cache folder {cache}, .*{told}"):
        served(store, cache, rows)
    assert {path: (path.stat().st_mtime_ns, mode_of(path)) for path in [cache, *cache.iterdir()]} == before


@pytest.mark.parametrize(
    ("flaw", "suffix"),
    [("another user's", ".rows.bin"), ("a link", ".keys.npy"), (0o666, ".json"), (0o620, ".rows.bin")],
)
def test_a_file_that_others_can_change_is_built_again(
    store: FeatureStore,
    cache: Path,
    rows: FeatureRows,
    give_away: Callable[[Path], None],
    tmp_path: Path,
    flaw: str | int,
    suffix: str,
) -> None:
    """Put there while the folder was open to others."""
    served(store, cache, rows)
    place = file_of(cache, suffix)
    number = place.stat().st_ino
    flip(place) if suffix == ".rows.bin" else None
    if isinstance(flaw, int):
        place.chmod(flaw)
    elif flaw == "a link":
        shutil.move(place, tmp_path / "elsewhere")
        place.symlink_to(tmp_path / "elsewhere")
    else:
        give_away(place)
    np.testing.assert_array_equal(served(store, cache, rows), rows.features_ND)
    assert not place.is_symlink() and (place.stat().st_ino != number or not IS_ROOT) and mode_of(place) == 0o600


def test_rows_that_were_changed_since_the_last_opening_are_built_again(
    store: FeatureStore, cache: Path, rows: FeatureRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a restart; also where the time of writing was set back."""
    served(store, cache, rows)
    place = file_of(cache, ".rows.bin")
    times = place.stat().st_atime_ns, place.stat().st_mtime_ns
    flip(place)
    os.utime(place, ns=times)
    np.testing.assert_array_equal(served(store, cache, rows), rows.features_ND)
    forged = place.with_name("forged")
    forged.write_bytes(bytes(place.stat().st_size))
    forged.chmod(0o600)
    forged.rename(place)
    np.testing.assert_array_equal(served(store, cache, rows), rows.features_ND)
    read: list[Path] = []
    monkeypatch.setattr("featurestore.lookup.cache.digest_of_file", lambda path: read.append(path) or "")
    served(store, cache, rows)
    assert read == []  # what has not changed is not read through again


def test_a_seal_counts_for_the_files_it_was_made_for_alone(store: FeatureStore, cache: Path, rows: FeatureRows) -> None:
    """All three files of another snapshot, under the name of this one: each fits the others, none the store."""
    served(store, cache, rows)
    newer = put(store, 200, seed=1)
    old = {path.name.split(".", 1)[1]: path for path in cache.glob("shard-0003-*")}
    served(store, cache, newer)
    for suffix, path in old.items():
        new = next(each for each in cache.glob(f"shard-0003-*.{suffix}") if each != path)
        shutil.copy(path, new)
    np.testing.assert_array_equal(served(store, cache, newer), newer.features_ND)
