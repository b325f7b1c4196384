"""The work on one unit of an import, inside a Dask worker: read, encode, compare with the store, stage.

Rows that the store has with the same numbers are not staged. What was seen is in an index with the parts, with a
digest of each row's numbers, so that the job can compare all units with each other.

Letters of shapes: N rows, M rows of the store, D feature width.
"""

import functools
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from featurestore.format.codec import read_npy
from featurestore.format.rows import FeatureRows
from featurestore.keys import Int64Array
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from featurestore.text import parse_json
from pipeline.store_run import BadRow
from pipeline.vectors.source import VectorBlock, VectorSlice, gathered

NEW, CHANGED, UNCHANGED = 0, 1, 2
INDEX_DTYPE = np.dtype([("key", "<i8"), ("low", "<u8"), ("high", "<u8"), ("state", "u1")])
CONTESTED = "several rows with different numbers under one key"
_REPORT, _INDEX = ".json", ".index.npy"

IndexArray = npt.NDArray[np.void]


@dataclass(frozen=True)
class UnitReport:
    """The outcome for the rows of a unit; its file is written last, and makes the unit complete."""

    parts: tuple[str, ...]
    num_rows: int  # bad ones included
    bad: tuple[BadRow, ...]

    @classmethod
    def load(cls, store: FeatureStore, run_id: str, unit: str) -> "UnitReport":
        """Load the report of a complete unit."""
        fields = parse_json(store.storage.read_bytes(_path(run_id, unit, _REPORT)))
        return cls(tuple(fields["parts"]), fields["num_rows"], tuple(BadRow(*bad) for bad in fields["bad"]))


def complete_units(storage: Storage, run_id: str) -> set[str]:
    """Name the units that an earlier run has staged whole."""
    names = storage.list(f"staging/{run_id}")
    return {name.removesuffix(_REPORT) for name in names if name.endswith(_REPORT)}


def stage_unit(
    store: FeatureStore,
    version: int,
    run_id: str,
    unit: str,
    slices: Sequence[VectorSlice],
    rows: int,
    contested: Sequence[int] = (),
) -> UnitReport:
    """Stage what `slices` have that snapshot `version` has not, in parts of about `rows` rows.

    Rows with `contested` keys are bad, but are in the index, where they are found again. Raises
    VectorImportError, StorageError.
    """
    stored = stored_index(store, version)
    parts: list[str] = []
    bad: list[BadRow] = []
    indexes, num_rows = [np.empty(0, INDEX_DTYPE)], 0
    for block in gathered(chain.from_iterable(piece.read(rows) for piece in slices), rows):
        num_rows += len(block) + len(block.bad)
        bad += block.bad
        if not len(block):
            continue
        bits_ND, storable_N = store.codec.encode_storable(store.project(block.vectors_ND))
        reason = f"not finite in {store.info.dtype}"
        bad += [BadRow(int(block.keys_N[row]), block.uris[row], reason) for row in np.flatnonzero(~storable_N)]
        index_N = _index(block, stored)
        indexes.append(index_N[storable_N])
        contested_N = storable_N & np.isin(block.keys_N, np.array(contested, np.int64))
        bad += [BadRow(int(block.keys_N[row]), block.uris[row], CONTESTED) for row in np.flatnonzero(contested_N)]
        staged_N = np.flatnonzero(storable_N & ~contested_N & (index_N["state"] != UNCHANGED))
        if len(staged_N):
            parts.append(f"{unit}-{len(parts):04d}")
            store.stage_part(run_id, parts[-1], _rows(block, bits_ND, index_N).take(staged_N))
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate(indexes))
    store.storage.write_bytes(_path(run_id, unit, _INDEX), buffer.getvalue())
    report = UnitReport(tuple(parts), num_rows, tuple(bad))
    store.storage.write_bytes(_path(run_id, unit, _REPORT), json.dumps(asdict(report)).encode())
    return report


def load_index(store: FeatureStore, run_id: str, unit: str) -> IndexArray:
    """Load keys, digests and states of the good rows of a complete unit, in their order."""
    index: IndexArray = read_npy(store.storage.read_bytes(_path(run_id, unit, _INDEX)))
    return index


def stored_index(store: FeatureStore, version: int) -> IndexArray:
    """Load keys and digests of the rows of a snapshot, by key; 25 bytes a row, kept until another is asked for."""
    commit_id = store.snapshot(version).manifest.commit_id  # another one in a store made anew at the same address
    return _stored_index(store.url, version, store.info.store_id, commit_id)


@functools.lru_cache(maxsize=1)
def _stored_index(url: str, version: int, store_id: str, commit_id: str) -> IndexArray:
    snapshot = FeatureStore.open(url).snapshot(version)
    indexes = [np.empty(0, INDEX_DTYPE)]
    for shard in sorted(snapshot.manifest.shards):
        table = snapshot.shard_reader(shard).read(["key", "content_digest"])
        digests: Any = table["content_digest"].combine_chunks()
        values = np.frombuffer(digests.buffers()[1], "<u8", 2 * len(table), 16 * digests.offset).reshape(-1, 2)
        index = np.zeros(len(table), INDEX_DTYPE)
        index["key"], index["low"], index["high"] = table["key"].to_numpy(), values[:, 0], values[:, 1]
        indexes.append(index)
    whole = np.concatenate(indexes)
    return whole[np.argsort(whole["key"])]


def _index(block: VectorBlock, stored: IndexArray) -> IndexArray:
    index_N = np.zeros(len(block), INDEX_DTYPE)
    index_N["key"] = block.keys_N
    vectors_ND = np.ascontiguousarray(block.vectors_ND, "<f4")
    digests = b"".join(xxhash.xxh3_128_digest(vector_D.data) for vector_D in vectors_ND)
    values = np.frombuffer(digests, "<u8").reshape(-1, 2)
    index_N["low"], index_N["high"] = values[:, 0], values[:, 1]
    place_N = np.searchsorted(stored["key"], block.keys_N)
    if len(stored):
        found = stored[np.minimum(place_N, len(stored) - 1)]
        is_stored_N = found["key"] == block.keys_N
        is_same_N = is_stored_N & (found["low"] == index_N["low"]) & (found["high"] == index_N["high"])
        index_N["state"] = np.where(is_same_N, UNCHANGED, np.where(is_stored_N, CHANGED, NEW))
    return index_N


def _rows(block: VectorBlock, bits_ND: npt.NDArray[Any], index_N: IndexArray) -> FeatureRows:
    digests: Int64Array = np.stack([index_N["low"], index_N["high"]], axis=1)
    data = np.ascontiguousarray(digests, "<u8").tobytes()
    return FeatureRows.of(
        block.uris,
        bits_ND,
        keys=block.keys_N,
        content_digests=[data[16 * row : 16 * row + 16] for row in range(len(block))],
    )


def _path(run_id: str, unit: str, suffix: str) -> str:
    return f"staging/{run_id}/{unit}{suffix}"
