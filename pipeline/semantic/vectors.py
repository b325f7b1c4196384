"""The vectors of images, from a snapshot of a store or a file of them; both in blocks, part by part.

Letters of shapes: N rows, D feature width.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from featurestore.identity import VECTORS_OF, SnapshotId
from featurestore.keys import Int64Array, splitmix64
from featurestore.snapshot import Snapshot
from featurestore.storage.storage import Storage
from featurestore.upkeep.remake import sample as sample_of_store
from pipeline.errors import VectorImportError
from pipeline.vectors import matrix, parquet
from pipeline.vectors.source import VectorSource, block_rows

Float32Array = npt.NDArray[np.float32]
Blocks = Iterator[tuple[Int64Array, Float32Array]]


@dataclass(frozen=True)
class StoreVectors:
    """The live rows of a snapshot; a part is a shard."""

    snapshot: Snapshot

    @property
    def dim(self) -> int:
        return self.snapshot.info.dim

    @property
    def are_components(self) -> bool:
        """Whether they are principal components, the weak ones of which would be blown up by standardising each."""
        return self.snapshot.info.reduction is not None

    @property
    def num_parts(self) -> int:
        return self.snapshot.info.num_shards

    def describe(self) -> dict[str, Any]:
        identity = SnapshotId.of(self.snapshot)
        return {**identity.named(), "extractor": self.snapshot.info.extractor.model_dump()}

    def sample(self, num_rows: int, seed: int) -> Float32Array:
        return sample_of_store(self.snapshot, num_rows, seed)[1]

    def blocks(self, part: int) -> Blocks:
        for block in self.snapshot.shard_reader(part).verified_blocks():
            yield block.keys_K, self.snapshot.codec.decode(block.features_KD)


@dataclass
class FileVectors:
    """A .npy matrix with its keys, or Parquet files; see pipeline.vectors. A part is a slice of a file.

    `origin`: of which run, checkpoint and snapshot jobs/export_embeddings.py made them; empty for other vectors.
    """

    address: str
    source: VectorSource
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    unusable: dict[int, int] = dataclasses.field(default_factory=dict)  # rows left out, by part

    @property
    def dim(self) -> int:
        return self.source.dim

    @property
    def are_components(self) -> bool:
        return False

    @property
    def num_parts(self) -> int:
        return len(self.source.slices)

    def describe(self) -> dict[str, Any]:
        of = {"of": self.origin} if self.origin else {}
        return {"vectors": self.address, "unusable_rows": sum(self.unusable.values()), **of}

    def sample(self, num_rows: int, seed: int) -> Float32Array:
        """Draw those with the smallest hashes: reads everything once."""
        rank_N, kept_ND = np.empty(0, np.uint64), np.empty((0, self.dim), np.float32)
        for part in range(self.num_parts):
            for keys_N, vectors_ND in self.blocks(part):
                rank_N = np.concatenate([rank_N, splitmix64(keys_N ^ seed)])
                kept_ND = np.concatenate([kept_ND, vectors_ND])
                chosen = np.argsort(rank_N, kind="stable")[:num_rows]
                rank_N, kept_ND = rank_N[chosen], kept_ND[chosen]
        return kept_ND

    def blocks(self, part: int) -> Blocks:
        unusable = 0
        for block in self.source.slices[part].read(block_rows(self.dim)):
            is_finite_N = np.isfinite(block.vectors_ND).all(axis=1)
            unusable += len(block.bad) + int((~is_finite_N).sum())
            yield block.keys_N[is_finite_N], block.vectors_ND[is_finite_N]
        self.unusable[part] = unusable


Vectors = StoreVectors | FileVectors
"""Vectors by key, all of one width; `blocks` gives the finite ones of a part, some megabytes at a time."""


def open_file(address: str, keys: str | None) -> FileVectors:
    """Open vectors that another job exported. Raises VectorImportError."""
    if PurePosixPath(address).suffix == ".npy":
        if keys is None:
            raise VectorImportError(
                f"{address} is a matrix: --keys names its keys, a .npy of int64 or a text file of ids"
            )
        return FileVectors(address, matrix.plan_matrix(address, keys, None), _origin_of_file(address))
    return FileVectors(address, parquet.plan_parquet(address, None, None, None), _origin_in(address))


def _origin_of_file(address: str) -> dict[str, Any]:
    """Read NAME.npy.json, in the folder of NAME.npy."""
    folder, slash, name = address.rpartition("/")
    try:
        return _mapping(Storage(folder or slash or ".").read_bytes(f"{name}.json"))
    except FileNotFoundError:
        return {}


def _origin_in(address: str) -> dict[str, Any]:
    """Read the metadata of a Parquet file; of a folder nothing is known."""
    folder, slash, name = address.rpartition("/")
    storage = Storage(folder or slash or ".")
    if not name.endswith(".parquet"):
        return {}
    with storage.open_input(name) as file:
        return _mapping((pq.read_schema(file).metadata or {}).get(VECTORS_OF.encode(), b"{}"))


def _mapping(text: bytes) -> dict[str, Any]:
    """Parse a JSON object; nothing where it is none: another program may use the same names."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
