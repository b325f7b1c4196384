"""The codes of all images: assigned part by part, written as Parquet, measured, and looked up by key.

Letters of shapes: N rows, M images, L levels, C codes of each.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.errors import StorageError
from featurestore.keys import Int64Array
from featurestore.storage.storage import Storage
from pipeline.errors import SampleError
from pipeline.semantic.codebook import Codebook
from pipeline.semantic.vectors import Vectors

FOLDER = "codes"
NO_CODE = -1  # of an image without a vector


@dataclass(frozen=True)
class CodeIndex:
    """Codes by key, in memory: 16 bytes an image. `prefix_M` is all codes of an image as one number in base C."""

    keys_M: Int64Array  # ascending
    prefix_M: Int64Array
    num_levels: int
    num_codes: int

    def lookup(self, keys_N: Int64Array) -> Int64Array:
        """Look up the full code of each key as one number, NO_CODE where it has none, (N,)."""
        if not len(self.keys_M):
            return np.full(len(keys_N), NO_CODE, np.int64)
        place_N = np.minimum(np.searchsorted(self.keys_M, keys_N), len(self.keys_M) - 1)
        return np.where(self.keys_M[place_N] == keys_N, self.prefix_M[place_N], NO_CODE)

    def code(self, full_N: Int64Array, level: int) -> Int64Array:
        """Give the codes of one level."""
        return np.where(full_N < 0, NO_CODE, self.prefix(full_N, level + 1) % self.num_codes)

    def prefix(self, full_N: Int64Array, length: int) -> Int64Array:
        """Give the first `length` codes as one number."""
        divisor = self.num_codes ** (self.num_levels - length)
        prefix_N: Int64Array = np.where(full_N < 0, NO_CODE, full_N // divisor)
        return prefix_N


@dataclass
class AssignedCodes:
    """The codes of all images, and what was measured on the way."""

    index: CodeIndex
    left_share: list[float] = dataclasses.field(default_factory=list)  # of the squared length, after each level

    def report(self) -> dict[str, Any]:
        """Measure usage and entropy of each level, prefixes, and how many images share their whole code."""
        index, levels = self.index, []
        for level in range(index.num_levels):
            counts_C = np.bincount(index.code(index.prefix_M, level), minlength=index.num_codes)
            levels.append(
                {
                    "used": int(np.count_nonzero(counts_C)),
                    "of": index.num_codes,
                    "entropy_bits": entropy_bits(counts_C),
                    "largest_share": float(counts_C.max() / max(1, int(counts_C.sum()))),
                    "distinct_prefixes": len(np.unique(index.prefix(index.prefix_M, level + 1))),
                    "reconstruction_error": self.left_share[level],
                }
            )
        _, counts_U = np.unique(index.prefix_M, return_counts=True)
        shared = int(counts_U[counts_U > 1].sum())
        return {
            "images": len(index.keys_M),
            "levels": levels,
            "full_codes": len(counts_U),
            "images_per_code": float(counts_U.mean()),
            "most_images_of_a_code": int(counts_U.max()),
            "images_that_share_their_code": shared,
            "collision_share": shared / len(index.keys_M),
        }


def entropy_bits(counts_C: npt.NDArray[np.int64]) -> float:
    """Compute the entropy of a code, in bits: log2 C where all codes are used alike."""
    share_C = counts_C[counts_C > 0] / max(1, int(counts_C.sum()))
    return float(-(share_C * np.log2(share_C)).sum()) + 0.0  # no -0.0


def assign(vectors: Vectors, codebook: Codebook, folder: Path, advance: Callable[[int], None]) -> AssignedCodes:
    """Compute the codes of all vectors, written to `folder`/part-*.parquet: key and one column for each level.

    Needs the memory of a block of vectors, and 16 bytes an image. `advance` is called for each part. Raises SampleError
    for a key that comes twice, or where there is no vector at all.
    """
    folder.mkdir()
    keys, prefixes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    length, left_L = 0.0, np.zeros(codebook.num_levels)
    types: dict[str, pa.DataType] = {"key": pa.int64()}
    types |= {f"sid{level}": pa.int32() for level in range(codebook.num_levels)}
    schema = pa.schema(types, {"codebook": codebook.digest})
    radix_L = codebook.num_codes ** np.arange(codebook.num_levels - 1, -1, -1, dtype=np.int64)
    for part in range(vectors.num_parts):
        writer: pq.ParquetWriter | None = None
        for keys_N, vectors_ND in vectors.blocks(part):
            if not len(keys_N):
                continue
            codes_NL, length_N, left_NL = codebook.encode(vectors_ND)
            length, left_L = length + float(length_N.sum()), left_L + left_NL.sum(axis=0)
            keys.append(keys_N.copy())
            prefixes.append(codes_NL @ radix_L)
            columns = [keys_N, *codes_NL.astype(np.int32).T]
            writer = writer or pq.ParquetWriter(folder / f"part-{part:05d}.parquet", schema, compression="zstd")
            writer.write_table(pa.table([pa.array(column) for column in columns], schema=schema))
        if writer is not None:
            writer.close()
        advance(1)
    index = _index(keys, prefixes, codebook.num_levels, codebook.num_codes)
    return AssignedCodes(index, [float(left / max(length, 1e-30)) for left in left_L])


def read_codes(storage: Storage, num_codes: int) -> CodeIndex:
    """Read the codes that `assign` wrote below FOLDER of a storage. Raises SampleError."""
    keys, prefixes, levels = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
    for name in storage.list(FOLDER):
        path = f"{FOLDER}/{name}"
        try:
            with storage.open_input(path) as file:
                table = pq.read_table(file)
        except (pa.ArrowException, OSError, StorageError) as error:
            raise SampleError(f"{storage.full(path)}: cannot be read: {error}") from error
        levels = table.num_columns - 1
        full_N = np.zeros(len(table), np.int64)
        for level in range(levels):
            full_N = full_N * num_codes + table.column(f"sid{level}").to_numpy()
        keys.append(table.column("key").to_numpy())
        prefixes.append(full_N)
    return _index(keys, prefixes, levels, num_codes)


def changed_keys(before: CodeIndex, now: CodeIndex) -> Int64Array:
    """List the keys that have another code than before, or have one only before or only now."""
    keys_N = np.union1d(before.keys_M, now.keys_M)
    changed_N: Int64Array = keys_N[before.lookup(keys_N) != now.lookup(keys_N)]
    return changed_N


def _index(keys: list[Int64Array], prefixes: list[Int64Array], num_levels: int, num_codes: int) -> CodeIndex:
    keys_M, prefix_M = np.concatenate(keys), np.concatenate(prefixes)
    if not len(keys_M):
        raise SampleError("there is not one vector to make codes of")
    order_M = np.argsort(keys_M, kind="stable")
    keys_M, prefix_M = keys_M[order_M], prefix_M[order_M]
    if (twice := np.flatnonzero(keys_M[1:] == keys_M[:-1])).size:
        raise SampleError(f"key {keys_M[twice[0]]} has several vectors; which is its image's?")
    return CodeIndex(keys_M, prefix_M, num_levels, num_codes)
