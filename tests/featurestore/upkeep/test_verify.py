"""verify: promises that hold no digest, gaps, old snapshots, what vanishes meanwhile, and what it says."""

import errno
import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from featurestore import FeaturePartition, FeatureRows, FeatureStore, StoreInfo, shard_of
from featurestore.errors import CorruptFileError, FormatVersionError, SnapshotNotFoundError, StorageError
from featurestore.format.datafile import encode, schema_of, table_of
from featurestore.format.shard import newest_rows
from featurestore.log import manifest_path
from featurestore.spec import FileEntry, Manifest, Sealed, seal, unseal
from featurestore.storage.local import DiskFiles
from featurestore.upkeep import verify as verify_module
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import expire
from featurestore.upkeep.history import pin
from featurestore.upkeep.verify import repair, verify
from tests.featurestore.conftest import make_rows, put
from tests.featurestore.contents import files_of, run, spoil


@pytest.fixture
def filled(store: FeatureStore) -> FeatureStore:
    put(store, 200)
    store.delete(make_rows(5, store.info).keys_N)
    return store


def merged_entry_of(store: FeatureStore) -> FileEntry:
    """A file that a compaction will replace."""
    return next(files[0] for files in store.snapshot().manifest.shards.values() if len(files) > 1)


def problems_of(store: FeatureStore) -> list[str]:
    return [str(problem) for problem in verify(store).problems]


def test_a_whole_store_has_no_problem(filled: FeatureStore) -> None:
    steps: list[tuple[int, int]] = []
    report = verify(filled, progress=lambda done, total: steps.append((done, total)))
    manifest = filled.snapshot().manifest
    assert report.problems == report.known == []
    assert (report.num_manifests, report.num_files, report.num_bytes) == (2, manifest.num_files, manifest.file_bytes)
    assert steps[-1] == (manifest.num_files, manifest.num_files) and len(steps) == 8


def test_files_of_older_snapshots_are_checked_once_and_told_apart(filled: FeatureStore) -> None:
    old = merged_entry_of(filled)
    compact(filled, force=True)
    filled.put(FeatureRows.of(["new.jpg"], np.zeros((1, 8), np.uint16)))
    each = {e.path for v in (1, 2, 3, 4) for files in filled.snapshot(v).manifest.shards.values() for e in files}
    assert verify(filled).num_files == len(each)
    spoil(filled, old.path)
    report = verify(filled)
    (problem,) = report.problems
    assert problem.path == old.path and problem.versions[0] == 1 and 4 not in problem.versions
    assert "The newest snapshot is whole" in str(problem)
    assert [found.path for found in verify(filled, 1).problems] == [old.path]
    assert verify(filled, 4).problems == []
    run("verify", filled.url, "--version", 4, code=0)
    with pytest.raises(SnapshotNotFoundError, match="no snapshot 9"):
        verify(filled, 9)


def test_files_that_expire_meanwhile_are_no_problem(filled: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    old, check = merged_entry_of(filled), verify_module.check_file
    compact(filled, force=True)
    assert verify(filled).problems == []

    def expired_before(*arguments: Any) -> object:
        monkeypatch.undo()
        expire(filled, keep_last=1, keep_days=0)
        (Path(filled.url) / old.path).unlink(missing_ok=True)
        return check(*arguments)

    monkeypatch.setattr(verify_module, "check_file", expired_before)
    assert verify(filled, threads=1).problems == []


@pytest.mark.parametrize("name", ["a data file", "store.json", manifest_path(1), manifest_path(2)])
def test_an_unreadable_sector_is_damage(filled: FeatureStore, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A person's own mistake is no damage: nothing may be moved away for it."""
    entry = files_of(filled)[0]
    place = Path(filled.url) / (entry.path if name == "a data file" else name)
    broken, code = place.stat().st_ino, errno.EACCES

    def failing(read: Callable[..., Any]) -> Callable[..., Any]:
        def read_or_fail(disk: DiskFiles, path: str, *out: memoryview) -> Any:
            if disk.path(path) == place and place.stat().st_ino == broken:
                raise OSError(code, os.strerror(code))
            return read(disk, path, *out)

        return read_or_fail

    for method in ("read_bytes", "read_into"):
        monkeypatch.setattr(DiskFiles, method, failing(getattr(DiskFiles, method)))
    for look in (verify, repair):
        with pytest.raises(StorageError, match="Permission denied"):
            look(filled)
    code = errno.EIO
    assert str(place.relative_to(filled.url)) in {problem.path for problem in verify(filled).problems}
    repair(filled)
    assert verify(filled).problems == [] and FeatureStore.open(filled.url).snapshot().num_rows > 0
    if name == "a data file":
        assert entry.path not in {file.path for file in filled.snapshot().manifest.files(3)}
        assert filled.snapshot().version == 3 and len(filled.quarantine_rows()) > 0
    else:
        assert [file.size_bytes for file in filled.storage.entries("damaged")] == [0]


def test_pins_of_nothing_and_of_another_name_are_found(filled: FeatureStore) -> None:
    pin(filled, "mine", 1)
    pins = Path(filled.url) / "pins"
    (pins / "other.json").write_bytes((pins / "mine.json").read_bytes())
    assert any("is the pin 'mine'" in problem and "unpin" in problem for problem in problems_of(filled))
    (pins / "other.json").unlink()
    (Path(filled.url) / manifest_path(1)).unlink()
    assert any("keeps snapshot 1, which is not there" in problem for problem in problems_of(filled))


def test_a_gap_is_no_problem_but_a_foreign_manifest_is(filled: FeatureStore) -> None:
    put(filled, 1)
    second = Path(filled.url) / manifest_path(2)
    whole = second.read_bytes()
    second.unlink()  # as an expiry with a pin on 1 leaves it
    assert problems_of(filled) == []
    manifest = unseal(whole, Manifest, "x")
    second.write_bytes(seal(manifest.model_copy(update={"commit_id": "50e0" * 8})))
    assert any("does not follow" in problem for problem in problems_of(filled))
    second.write_bytes(seal(manifest.model_copy(update={"file_rows": 1})))
    assert any("counts other files, rows or bytes" in problem for problem in problems_of(filled))


@pytest.mark.parametrize(("name", "model"), [("store.json", StoreInfo), (manifest_path(2), Manifest)])
def test_a_file_of_a_newer_program_asks_for_an_update(filled: FeatureStore, name: str, model: type[Sealed]) -> None:
    path = Path(filled.url) / name
    path.write_bytes(seal(unseal(path.read_bytes(), model, "x").model_copy(update={"format_version": 2})))
    for look in (verify, repair):
        with pytest.raises(FormatVersionError, match="format 2"):
            look(filled)
    path.write_bytes(json.dumps({**json.loads(path.read_bytes()), "format_version": 1}).encode())
    assert [problem.kind for problem in verify(filled).problems] == [{"store.json": "info"}.get(name, "manifest")]


def rewritten(store: FeatureStore, change: Callable[[pa.Table], pa.Table], shard: int = 3, **counts: int) -> None:
    """Replace the data file of a shard and the manifest by ones that fit each other, but break a promise."""
    manifest = store.snapshot().manifest
    entry = manifest.files(shard)[0]
    path = Path(store.url) / entry.path
    data = bytes(encode(change(pq.read_table(path)).cast(schema_of(store.info)), store.info))
    path.write_bytes(data)
    table = pq.read_table(io.BytesIO(data))
    digests = {"sha256": hashlib.sha256(data).hexdigest(), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    fixed = entry.model_copy(update={"bytes": len(data), "rows": len(table), **digests, **counts})
    shards = {**manifest.shards, shard: (fixed, *manifest.files(shard)[1:])}
    files = [file for each in shards.values() for file in each]
    sums = {"file_rows": sum(file.rows for file in files), "file_bytes": sum(file.bytes for file in files)}
    log = Path(store.url) / manifest_path(manifest.version)
    log.write_bytes(seal(manifest.model_copy(update={"shards": shards, **sums})))


BROKEN_PROMISES: dict[str, Callable[[pa.Table], pa.Table]] = {
    "not in the order": lambda table: table.take(list(range(len(table)))[::-1]),
    "a key twice": lambda table: table.take([0, *range(len(table))]),
    "tombstones instead of 0": lambda table: table.set_column(6, "deleted", pa.array([True] * len(table))),
}


@pytest.mark.parametrize("promise", BROKEN_PROMISES)
def test_broken_promises_are_found_where_all_digests_fit(store: FeatureStore, promise: str, tmp_path: Path) -> None:
    put(store, 200)
    rewritten(store, BROKEN_PROMISES[promise])
    found = problems_of(store)
    assert len(found) == 1 and promise in found[0] and files_of(store)[0].path in found[0]
    if "tombstones" not in promise:
        with pytest.raises(CorruptFileError, match="shard 3"):
            FeaturePartition.load(store, cache_dir=tmp_path / "cache")


def test_a_foreign_shard_and_values_that_are_not_finite_are_found(store: FeatureStore) -> None:
    rows = put(store, 200)
    strange = rows.take(np.flatnonzero(shard_of(rows.keys_N, 8) == 4))
    strange = strange.take(newest_rows(strange.keys_N))
    rewritten(store, lambda table: table_of(strange, store.info))
    assert any(f"{len(strange)} keys that do not belong to shard 3" in problem for problem in problems_of(store))
    infinite = replace(strange, features_ND=np.full_like(strange.features_ND, 0x7F80))
    rewritten(store, lambda table: table_of(infinite, store.info), shard=4)
    assert any(f"{len(strange)} features that are not finite" in problem for problem in problems_of(store))


def test_two_uris_of_one_key_without_a_delete_are_found(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(1, store.info)
    other = FeatureRows.of(["other"], rows.features_ND, keys=rows.keys_N)
    store.put(rows)
    store.delete(rows.keys_N)
    store.put(other)
    assert problems_of(store) == []
    monkeypatch.setattr("featurestore.format.shard.ShardReader.check_uris", lambda *_: None)
    store.put(rows)
    store.put(rows)
    found = problems_of(store)
    assert len(found) == 1 and f"1 keys belong to two uris, {rows.keys_N[0]} is one" in found[0]


def test_the_command_exits_with_1_and_names_file_and_command(filled: FeatureStore) -> None:
    assert "0 problems in 2 manifests" in run("verify", filled.url, code=0).output
    spoil(filled, files_of(filled)[0].path)
    done = run("verify", filled.url, code=1)
    assert done.output.count("broken: ") == 1 and "1 problem in" in done.output
    assert f"{files_of(filled)[0].path} is damaged" in done.output and f"repair {filled.url}`" in done.output
    (Path(filled.url) / "store.json").write_bytes(b"{}")
    done = run("verify", filled.url, code=1)
    assert "broken: " in done.output and "rebuilds it from a data file" in done.output
