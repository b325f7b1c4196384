"""A cache serves what this user's runs built: other users cannot put rows into it, and what changed later is found."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from featurestore import FeaturePartition, FeatureRows, FeatureStore
from featurestore.__main__ import app
from featurestore.errors import StorageError
from featurestore.upkeep.verify import verify_cache

OTHER = 12_345
IS_ROOT = os.geteuid() == 0


@pytest.fixture
def rows(store: FeatureStore, make_rows) -> FeatureRows:
    made: FeatureRows = make_rows(200, store.info)
    store.put(made)
    return made


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
    before = os.umask(0)
    try:
        served(store, cache / "below", rows)
    finally:
        os.umask(before)
    assert mode_of(cache / "below") == 0o700
    assert {mode_of(path) for path in (cache / "below").iterdir()} == {0o600}


def test_a_folder_of_another_user_is_refused(
    store: FeatureStore, cache: Path, rows: FeatureRows, give_away: Callable[[Path], None]
) -> None:
    served(store, cache, rows)
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    give_away(cache)
    with pytest.raises(StorageError, match=f"can write into the cache folder {cache}, .*data.cache_dir"):
        served(store, cache, rows)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before


@pytest.mark.parametrize("suffix", [".rows.bin", ".keys.npy", ".json"])
def test_files_of_another_user_are_built_again(
    store: FeatureStore, cache: Path, rows: FeatureRows, give_away: Callable[[Path], None], suffix: str
) -> None:
    """Put there while the folder was open to others."""
    served(store, cache, rows)
    place = file_of(cache, suffix)
    flip(place) if suffix == ".rows.bin" else None
    give_away(place)
    assert "others may write to it" in verify_cache(cache).problems[0]
    np.testing.assert_array_equal(served(store, cache, rows), rows.features_ND)
    if IS_ROOT:
        assert file_of(cache, suffix).stat().st_uid == 0 and verify_cache(cache).problems == []


@pytest.mark.parametrize("mode", [0o666, 0o620])
def test_files_that_others_may_write_to_are_built_again(
    store: FeatureStore, cache: Path, rows: FeatureRows, mode: int
) -> None:
    served(store, cache, rows)
    place = file_of(cache, ".rows.bin")
    number = place.stat().st_ino
    place.chmod(mode)
    np.testing.assert_array_equal(served(store, cache, rows), rows.features_ND)
    assert place.stat().st_ino != number and mode_of(place) == 0o600


def test_a_link_in_the_place_of_a_cache_file_is_not_followed(
    store: FeatureStore, cache: Path, rows: FeatureRows, tmp_path: Path
) -> None:
    served(store, cache, rows)
    place = file_of(cache, ".rows.bin")
    shutil.move(place, tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    served(store, cache, rows)
    assert not place.is_symlink() and (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_folder_into_which_others_can_write_is_refused(
    store: FeatureStore, cache: Path, rows: FeatureRows, mode: int
) -> None:
    cache.mkdir()
    cache.chmod(mode)
    with pytest.raises(StorageError, match=r"can write into the cache folder .*data.cache_dir.*chmod 700"):
        served(store, cache, rows)
    assert mode_of(cache) == mode


def test_a_folder_that_others_only_read_stays_as_it_is(store: FeatureStore, cache: Path, rows: FeatureRows) -> None:
    cache.mkdir()
    cache.chmod(0o755)
    np.testing.assert_array_equal(served(store, cache, rows), rows.features_ND)
    assert mode_of(cache) == 0o755 and mode_of(file_of(cache, ".rows.bin")) == 0o600


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


def test_a_seal_counts_for_the_files_it_was_made_for_alone(
    store: FeatureStore, cache: Path, rows: FeatureRows, make_rows
) -> None:
    """All three files of another snapshot, under the name of this one: each fits the others, none the store."""
    served(store, cache, rows)
    newer = make_rows(200, store.info, seed=1)
    store.put(newer)
    old = {path.name.split(".", 1)[1]: path for path in cache.glob("shard-0003-*")}
    served(store, cache, newer)
    for suffix, path in old.items():
        new = next(each for each in cache.glob(f"shard-0003-*.{suffix}") if each != path)
        shutil.copy(path, new)
    np.testing.assert_array_equal(served(store, cache, newer), newer.features_ND)


@pytest.mark.parametrize("suffix", [".rows.bin", ".keys.npy", ".json"])
def test_verify_finds_a_bit_that_flipped_unseen(
    store: FeatureStore, cache: Path, rows: FeatureRows, suffix: str
) -> None:
    served(store, cache, rows)
    report = verify_cache(cache)
    files = [path for path in cache.iterdir() if path.suffix != ".json"]
    assert report.problems == [] and report.num_shards == 8
    assert report.num_bytes == sum(path.stat().st_size for path in files)
    place = file_of(cache, suffix)
    size = place.stat().st_size
    whole = place.read_bytes()
    found = 0
    for start in range(0, size, max(1, size // 20)):
        flip(place, start)
        (problem,) = verify_cache(cache).problems or [""]
        found += place.name.split(".")[0] in problem and "the next run builds it again" in problem
        place.write_bytes(whole)
    flips = len(range(0, size, max(1, size // 20)))
    # Of a seal some characters say when and of which file its digest was checked: the next opening reads the rows then.
    assert found == flips if suffix != ".json" else found > flips / 2
    assert verify_cache(cache).problems == []


def test_verify_of_a_cache_names_missing_files(store: FeatureStore, cache: Path, rows: FeatureRows) -> None:
    served(store, cache, rows)
    file_of(cache, ".keys.npy").unlink()
    (cache / "mine.txt").touch()
    report = verify_cache(cache)
    assert len(report.problems) == 1 and ".keys.npy is missing" in report.problems[0]


def test_the_command(store: FeatureStore, tmp_path: Path, rows: FeatureRows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "crossmedia" / "features"

    def run(*args: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["verify", *args])
        assert not isinstance(result.exception, Exception)
        return result.exit_code, result.output

    assert run("--cache")[0] == 1 and "cannot read the cache folder" in run("--cache")[1]
    served(store, cache, rows)
    for args in (["--cache"], ["--cache", str(cache)], [str(cache), "--cache"]):
        code, output = run(*args)
        assert code == 0 and "0 problems in 8 cached shards" in output and str(cache) in output
    assert run("--cache", str(tmp_path)) == (0, f"nothing to check: {tmp_path} has no cached shards\n")
    flip(file_of(cache, ".rows.bin"))
    code, output = run("--cache")
    assert code == 1 and "broken: " in output and ".rows.bin is not what was built" in output
    assert run()[0] == 2 and run("--cache", "--version", "1")[0] == 2
    assert run(store.url)[0] == 0
