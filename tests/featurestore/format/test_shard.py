"""A shard's files: written the same in one block or many, refused out of order, and several of them read as one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pytest

from featurestore import FeatureStore, StoreInfo, to_bits
from featurestore.errors import CorruptFileError, InvalidRowsError
from featurestore.format.codec import Moments
from featurestore.format.datafile import FeatureRows, matrix_of, open_entry
from featurestore.format.shard import read_moments, write_shard_file
from featurestore.keys import shard_of
from featurestore.spec import FileEntry, Manifest, seal, unseal
from featurestore.staging import sorted_table
from featurestore.storage.local import DiskFiles
from tests.featurestore.conftest import make_rows, put


@pytest.fixture
def one(tmp_path: Path, info: StoreInfo, monkeypatch: pytest.MonkeyPatch) -> FeatureStore:
    monkeypatch.setattr("featurestore.format.shard._CHUNK_BYTES", 1000)  # files are checked in pieces
    return FeatureStore.create(tmp_path / "one", info.model_copy(update={"num_shards": 1}))


@pytest.fixture
def table(one: FeatureStore) -> pa.Table:
    return sorted_table(make_rows(100, one.info), one.info)


def write(store: FeatureStore, *blocks: pa.Table) -> FileEntry:
    return write_shard_file(store.storage, store.info, 0, blocks, "delta", 7)


@pytest.mark.parametrize("sizes", [(100,), (1, 99), (30, 0, 30, 40), (0, 100)])
def test_in_one_block_or_many(one: FeatureStore, table: pa.Table, sizes: tuple[int, ...]) -> None:
    starts = np.cumsum([0, *sizes])
    entry = write(one, *(table.slice(start, size) for start, size in zip(starts, sizes, strict=False)))
    assert (entry.rows, entry.num_deleted, entry.based_on, entry.kind) == (100, 0, 7, "delta")
    for check in ("sha256", "xxh3_128"):
        with open_entry(one.storage, one.info, entry, check) as file:
            assert file.read().equals(table)
    assert entry.bytes == one.storage.size(entry.path)
    moments, expected = read_moments(one.storage, entry), Moments.of(matrix_of(table, one.info), one.info.dtype)
    assert moments is not None and moments.count == 100
    np.testing.assert_allclose(moments.mean_D, expected.mean_D, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.m2_D, expected.m2_D, rtol=1e-6)


def test_no_rows_are_a_file_too(one: FeatureStore, table: pa.Table) -> None:
    entry = write(one, table.slice(0, 0))
    assert (entry.rows, entry.statistics_path) == (0, None)
    with open_entry(one.storage, one.info, entry, "sha256") as file:
        assert file.read().equals(table.slice(0, 0))


def test_statistics_are_kept_where_they_are_small_beside_the_rows(one: FeatureStore, table: pa.Table) -> None:
    per_row, statistics = one.info.row_bytes, Moments.empty(one.info.dim).size_bytes
    enough = -(-4 * statistics // per_row)
    assert write(one, table.slice(0, enough)).statistics_path is not None
    assert write(one, table.slice(0, enough - 1)).statistics_path is None


def test_rows_of_other_shards_are_refused_and_no_file_appears(store: FeatureStore) -> None:
    with pytest.raises(InvalidRowsError, match="do not belong to shard 0"):
        write(store, sorted_table(make_rows(50, store.info), store.info))
    assert store.storage.entries("data") == []


@pytest.mark.parametrize("chunk_bytes", [1, 1000, 1 << 20])
@pytest.mark.parametrize("suffix", [".parquet", ".npy"])
def test_a_disk_that_keeps_other_bytes_is_noticed(
    one: FeatureStore, table: pa.Table, monkeypatch: pytest.MonkeyPatch, suffix: str, chunk_bytes: int
) -> None:
    open_output = DiskFiles.open_output

    @contextmanager
    def flipping(self: DiskFiles, path: str) -> Iterator[IO[bytes]]:
        with open_output(self, path) as file:
            yield file
        if path.endswith(suffix):
            data = bytearray(self.path(path).read_bytes())
            data[len(data) // 2] ^= 16
            self.path(path).write_bytes(data)

    monkeypatch.setattr(DiskFiles, "open_output", flipping)
    monkeypatch.setattr("featurestore.format.shard._CHUNK_BYTES", chunk_bytes)
    with pytest.raises(CorruptFileError, match=rf"{suffix} is damaged"):
        write(one, table)


def test_a_shard_knows_its_keys_and_their_uris(store: FeatureStore, info: StoreInfo) -> None:
    keys = np.arange(40)
    empty = store.snapshot().shard_reader(0)
    assert not empty.contains(keys).any() and empty.uris(keys)[1] == []
    features = to_bits(np.ones((len(keys), info.dim), np.float32), info.dtype)
    rows = FeatureRows.of([f"{key}.jpg" for key in keys], features, keys=keys)
    store.put(rows)
    store.delete(np.arange(10, 15))
    store.put(rows.take(np.array([12])))
    reader = store.snapshot().shard_reader(0)
    here = keys[shard_of(keys, info.num_shards) == 0]
    live = np.array([key for key in here.tolist() if key not in (10, 11, 13, 14)])
    np.testing.assert_array_equal(np.sort(reader.keys()), live)
    asked = np.array([live[-1], 10, 10_000, live[0], live[-1]])
    found, uris = reader.uris(asked)
    assert found.tolist() == [live[-1], live[0], live[-1]]
    assert uris == [f"{key}.jpg" for key in found]
    np.testing.assert_array_equal(reader.contains(asked), [True, False, False, True, True])
    assert reader.uris(np.array([10_000]))[1] == []
    assert not reader.contains(np.empty(0, np.int64)).any()


@pytest.mark.parametrize("size", [10**13, 2**63 - 1])
def test_a_manifest_that_names_a_huge_file_asks_for_no_memory(store: FeatureStore, size: int) -> None:
    put(store, 4)
    entry = store.snapshot().manifest.entries[0].model_copy(update={"bytes": size})
    with pytest.raises(CorruptFileError, match=f"bytes instead of {size}"):
        open_entry(store.storage, store.info, entry, "xxh3_128").__enter__()


@pytest.mark.parametrize("name", ["bytes", "rows", "num_deleted"])
def test_a_count_below_zero_is_damage(store: FeatureStore, name: str) -> None:
    manifest = store.put(make_rows(4, store.info)).manifest
    shard = next(iter(manifest.shards))
    entry = manifest.shards[shard][0].model_copy(update={name: -1})
    damaged = manifest.model_copy(update={"shards": manifest.shards | {shard: (entry,)}})
    with pytest.raises(CorruptFileError, match=f"{name}=-1"):
        unseal(seal(damaged), Manifest, "log")
