"""Where the vectors of images come from: a snapshot of a store, or a file of them; both in blocks, part by part.

Letters of shapes: N rows, D feature width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from featurestore.keys import Int64Array, splitmix64
from featurestore.snapshot import Snapshot
from featurestore.upkeep.recode import sample as sample_of_store
from pipeline.errors import VectorImportError
from pipeline.imports import matrix, parquet
from pipeline.imports.source import Source, block_rows

Float32Array = npt.NDArray[np.float32]
Blocks = Iterator[tuple[Int64Array, Float32Array]]


class Vectors(Protocol):
    """Vectors by key, all of one width."""

    @property
    def dim(self) -> int:
        """Numbers of a vector."""

    @property
    def num_parts(self) -> int:
        """Parts that `blocks` reads."""

    def describe(self) -> dict[str, Any]:
        """What they are, for the report."""

    def sample(self, num_rows: int, seed: int) -> Float32Array:
        """At most `num_rows` vectors, drawn by `seed`, (N, D)."""

    def blocks(self, part: int) -> Blocks:
        """Keys and vectors of a part, some megabytes at a time; finite ones alone."""


@dataclass(frozen=True)
class StoreVectors:
    """The live rows of a snapshot; a part is a shard."""

    snapshot: Snapshot

    @property
    def dim(self) -> int:
        return self.snapshot.info.dim

    @property
    def num_parts(self) -> int:
        return self.snapshot.info.num_shards

    def describe(self) -> dict[str, Any]:
        manifest = self.snapshot.manifest
        return {
            "store": self.snapshot.storage.url,
            "snapshot": manifest.version,
            "commit_id": manifest.commit_id,
            "extractor": self.snapshot.info.extractor.model_dump(),
        }

    def sample(self, num_rows: int, seed: int) -> Float32Array:
        return sample_of_store(self.snapshot, num_rows, seed)[1]

    def blocks(self, part: int) -> Blocks:
        for block in self.snapshot.shard_reader(part).verified_blocks():
            yield block.keys_K, self.snapshot.codec.decode(block.features_KD)


@dataclass
class FileVectors:
    """A .npy matrix with its keys, or Parquet files; see pipeline.imports. A part is a slice of a file."""

    address: str
    source: Source
    unusable: dict[int, int] = field(default_factory=dict)  # rows left out, by part

    @property
    def dim(self) -> int:
        return self.source.dim

    @property
    def num_parts(self) -> int:
        return len(self.source.slices)

    def describe(self) -> dict[str, Any]:
        return {"vectors": self.address, "unusable_rows": sum(self.unusable.values())}

    def sample(self, num_rows: int, seed: int) -> Float32Array:
        """Those with the smallest hashes: reads everything once."""
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


def open_file(address: str, keys: str | None) -> FileVectors:
    """Vectors that another job exported. Raises VectorImportError."""
    if PurePosixPath(address).suffix == ".npy":
        if keys is None:
            raise VectorImportError(
                f"{address} is a matrix: --keys names its keys, a .npy of int64 or a text file of ids"
            )
        return FileVectors(address, matrix.plan(address, keys, None))
    return FileVectors(address, parquet.plan(address, None, None, None))
