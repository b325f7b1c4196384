"""Every damaged file is found and named; nothing damaged is ever served."""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from featurestore import FeaturePartition, FeatureRows, FeatureStore, StoreInfo, shard_of
from featurestore.datafile import DataFile, encode, schema_of, table_of
from featurestore.errors import CorruptFileError, FormatVersionError, SnapshotNotFoundError
from featurestore.log import manifest_path
from featurestore.shard import newest_rows
from featurestore.spec import FileEntry, Manifest, seal, unseal
from featurestore.verify import verify


@pytest.fixture
def filled(store: FeatureStore, make_rows) -> FeatureStore:
    store.put(make_rows(200, store.info))
    store.delete(make_rows(5, store.info).keys_N)
    return store


def entry_of(store: FeatureStore, shard: int = 3) -> FileEntry:
    return store.snapshot().manifest.files(shard)[0]


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def problems_of(store: FeatureStore) -> list[str]:
    return verify(store).problems


def test_a_whole_store_has_no_problem(filled: FeatureStore) -> None:
    report = verify(filled)
    assert report.problems == []
    assert report.num_manifests == 2
    assert report.num_files == filled.snapshot().manifest.num_files


def test_a_flipped_bit_anywhere_in_a_data_file_is_found(filled: FeatureStore, tmp_path: Path) -> None:
    entry = entry_of(filled)
    path = Path(filled.url) / entry.path
    whole = path.read_bytes()
    for place in range(0, len(whole), 131):
        flip(path, place, place % 8)
        with pytest.raises(CorruptFileError, match=entry.path):
            FeaturePartition.load(filled, cache_dir=tmp_path / "cache")
        path.write_bytes(whole)
    flip(path, len(whole) // 2)
    assert len(problems_of(filled)) == 1 and entry.path in problems_of(filled)[0]
    assert not list((tmp_path / "cache").glob("shard-0003-*"))
    assert not list((tmp_path / "cache").glob(".tmp-*"))


def test_page_checksums_find_a_flipped_bit_without_the_sha256(info: StoreInfo, make_rows) -> None:
    rows = make_rows(200, info)
    data = bytearray(encode(table_of(rows, info), info))
    place = bytes(data).index(rows.features_ND[100].tobytes())  # lz4 keeps what does not repeat as it is
    data[place] ^= 1
    assert pq.read_table(pa.BufferReader(bytes(data))).num_rows == 200  # a default read does not notice
    with pytest.raises(CorruptFileError, match="x is damaged"):
        DataFile(pa.BufferReader(bytes(data)), info, "x").read()


@pytest.mark.parametrize("damage", [lambda data: data[:-10], lambda data: b"", lambda data: data + b"x"])
def test_a_file_of_another_size_is_found(
    filled: FeatureStore, damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    entry = entry_of(filled)
    path = Path(filled.url) / entry.path
    path.write_bytes(damage(path.read_bytes()))
    assert any(entry.path in problem for problem in problems_of(filled))
    with pytest.raises(CorruptFileError, match=entry.path):
        filled.snapshot().read_shard(3)
    with pytest.raises(CorruptFileError, match=entry.path):
        FeaturePartition.load(filled, cache_dir=tmp_path)


def test_a_missing_file_is_found(filled: FeatureStore, tmp_path: Path) -> None:
    entry = entry_of(filled)
    (Path(filled.url) / entry.path).unlink()
    assert problems_of(filled) == [f"{filled.url}/{entry.path} is missing"]
    with pytest.raises(CorruptFileError, match="is missing"):
        FeaturePartition.load(filled, cache_dir=tmp_path)
    with pytest.raises(CorruptFileError, match="is missing"):
        filled.snapshot().keys()


def test_damaged_statistics_are_found(store: FeatureStore, make_rows) -> None:
    store.put(make_rows(600, store.info))
    entry = entry_of(store)
    path = Path(store.url) / str(entry.statistics_path)
    flip(path, path.stat().st_size - 1)
    assert len(problems_of(store)) == 1 and str(entry.statistics_path) in problems_of(store)[0]
    with pytest.raises(CorruptFileError, match=str(entry.statistics_path)):
        store.snapshot().statistics()


@pytest.mark.parametrize("version", [1, 2])
def test_a_flipped_bit_anywhere_in_a_manifest_is_found(filled: FeatureStore, version: int) -> None:
    path = Path(filled.url) / manifest_path(version)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        flip(path, place, place % 8)
        with pytest.raises(CorruptFileError, match=path.name):
            filled.snapshot(version)
        path.write_bytes(whole)
    flip(path, len(whole) // 2)
    assert any(path.name in problem for problem in problems_of(filled))


def test_a_flipped_bit_anywhere_in_store_json_is_found(filled: FeatureStore) -> None:
    path = Path(filled.url) / "store.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        flip(path, place, place % 8)
        with pytest.raises(CorruptFileError, match=r"store\.json"):
            FeatureStore.open(filled.url)
        path.write_bytes(whole)


def test_a_manifest_under_another_version_and_a_gap_are_found(filled: FeatureStore, make_rows) -> None:
    log = Path(filled.url) / "log"
    third = log / Path(manifest_path(3)).name
    third.write_bytes((log / Path(manifest_path(2)).name).read_bytes())
    with pytest.raises(CorruptFileError, match="is the manifest of version 2"):
        filled.snapshot()
    third.unlink()
    filled.put(make_rows(1, filled.info))
    (log / Path(manifest_path(2)).name).unlink()
    assert any("the versions between 1 and 3 are gone" in problem for problem in problems_of(filled))
    with pytest.raises(SnapshotNotFoundError):
        filled.snapshot(2)


def test_a_manifest_that_does_not_follow_its_parent_is_found(filled: FeatureStore) -> None:
    path = Path(filled.url) / manifest_path(2)
    manifest = unseal(path.read_bytes(), Manifest, "x")
    path.write_bytes(seal(manifest.model_copy(update={"parent": "someone"})))
    assert any("does not follow" in problem for problem in problems_of(filled))


def test_a_newer_format_asks_for_an_update(filled: FeatureStore) -> None:
    path = Path(filled.url) / "store.json"
    info = unseal(path.read_bytes(), StoreInfo, "x")
    path.write_bytes(seal(info.model_copy(update={"format_version": 2})))
    with pytest.raises(FormatVersionError, match="format 2"):
        FeatureStore.open(filled.url)
    fields = json.loads(path.read_bytes())
    path.write_bytes(json.dumps({**fields, "format_version": 1}).encode())
    with pytest.raises(CorruptFileError):
        FeatureStore.open(filled.url)


def rewritten(store: FeatureStore, change: Callable[[pa.Table], pa.Table], shard: int = 3, **counts: int) -> None:
    """Replace the data file of a shard and the manifest by ones that fit each other, but break a promise."""
    manifest = store.snapshot().manifest
    entry = manifest.files(shard)[0]
    path = Path(store.url) / entry.path
    data = bytes(encode(change(pq.read_table(path)).cast(schema_of(store.info)), store.info))
    path.write_bytes(data)
    table = pq.read_table(io.BytesIO(data))
    digests = {"sha256": hashlib.sha256(data).hexdigest(), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    changed = {"bytes": len(data), "rows": len(table), **digests, **counts}
    fixed = entry.model_copy(update=changed)
    shards = {**manifest.shards, shard: (fixed, *manifest.files(shard)[1:])}
    log = Path(store.url) / manifest_path(manifest.version)
    log.write_bytes(seal(manifest.model_copy(update={"shards": shards})))


BROKEN_PROMISES: dict[str, Callable[[pa.Table], pa.Table]] = {
    "not in the order": lambda table: table.take(list(range(len(table)))[::-1]),
    "a key twice": lambda table: table.take([0, *range(len(table))]),
    "other tombstones": lambda table: table.set_column(6, "deleted", pa.array([True] * len(table))),
}


@pytest.mark.parametrize("promise", BROKEN_PROMISES)
def test_broken_promises_are_found_where_all_digests_fit(
    store: FeatureStore, make_rows, promise: str, tmp_path: Path
) -> None:
    store.put(make_rows(200, store.info))
    rewritten(store, BROKEN_PROMISES[promise])
    expected = "another number of tombstones" if promise == "other tombstones" else promise
    found = problems_of(store)
    assert len(found) == 1 and expected in found[0] and entry_of(store).path in found[0]
    if promise != "other tombstones":
        with pytest.raises(CorruptFileError, match="shard 3"):
            FeaturePartition.load(store, cache_dir=tmp_path / "cache")


def test_a_foreign_shard_values_and_collisions_are_found(store: FeatureStore, make_rows) -> None:
    rows = make_rows(200, store.info)
    store.put(rows)
    strange = rows.take(np.flatnonzero(shard_of(rows.keys_N, 8) == 4))
    strange = strange.take(newest_rows(strange.keys_N))
    rewritten(store, lambda table: table_of(strange, store.info))
    assert any("do not belong to shard 3" in problem for problem in problems_of(store))
    infinite = replace(strange, features_ND=np.full_like(strange.features_ND, 0x7F80))
    rewritten(store, lambda table: table_of(infinite, store.info), shard=4)
    assert any("not finite" in problem for problem in problems_of(store))


def test_a_collision_between_files_is_found(store: FeatureStore, make_rows, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(1, store.info)
    store.put(rows)
    monkeypatch.setattr("featurestore.shard.ShardReader.check_uris", lambda *_: None)
    store.put(FeatureRows.of(["other"], rows.features_ND, keys=rows.keys_N))
    found = problems_of(store)
    assert len(found) == 1 and "stands for two uris" in found[0]


def test_a_damaged_quarantine_is_named(store: FeatureStore) -> None:
    store.storage.write_bytes("quarantine/x.parquet", b"PAR1 no")
    with pytest.raises(CorruptFileError, match=r"x\.parquet"):
        store.quarantine_rows()
