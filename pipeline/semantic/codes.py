"""Semantic IDs: codebooks trained on vectors, and the codes of each image.

Letters of shapes: N rows, M images, D feature width, L levels, C codes of each.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors import numpy as tensors

from featurestore.errors import StorageError
from featurestore.format.codec import file_metadata
from featurestore.index import encode_residual, train_residual_quantizer
from featurestore.keys import Int64Array, splitmix64
from featurestore.parsing import parse_json
from featurestore.snapshot import VECTORS_OF, Snapshot, SnapshotId
from featurestore.storage.storage import Storage, file_at
from featurestore.text import one_line
from featurestore.upkeep.remake import sample as sample_of_store
from pipeline.errors import SampleError
from pipeline.vectors.formats import VectorSource, block_rows, plan_parquet

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Codebook:
    """A residual quantiser: `source` says of what it was trained; `digest` is the sha256 of its file."""

    codebooks_LCD: Float32Array
    mean_D: Float32Array
    std_D: Float32Array
    source: dict[str, Any]

    @property
    def num_levels(self) -> int:
        return int(self.codebooks_LCD.shape[0])

    @property
    def num_codes(self) -> int:
        return int(self.codebooks_LCD.shape[1])

    @property
    def dim(self) -> int:
        return int(self.codebooks_LCD.shape[2])

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Write the file's content; equal codebooks give equal bytes."""
        arrays = {"codebooks": self.codebooks_LCD, "mean": self.mean_D, "std": self.std_D}
        return bytes(tensors.save(arrays, {"source": json.dumps(self.source, sort_keys=True)}))

    @classmethod
    def from_bytes(cls, data: bytes, place: str) -> "Codebook":
        """Read what `to_bytes` wrote. Raises SampleError, which names the place."""
        try:
            arrays = tensors.load(data)
            source = parse_json(file_metadata(data)["source"])
            return cls(arrays["codebooks"], arrays["mean"], arrays["std"], source)
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise SampleError(f"{place} is no codebook of this job: {error}") from error

    def standardize(self, vectors_ND: Float32Array) -> Float32Array:
        """Move vectors to the space in which codes are nearest neighbours."""
        return ((vectors_ND - self.mean_D) / self.std_D).astype(np.float32, copy=False)

    def encode(
        self, vectors_ND: Float32Array
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Compute codes (N, L), squared lengths of the standardised vectors (N,), what each level leaves (N, L)."""
        rows_ND = self.standardize(vectors_ND)
        length_N = np.einsum("nd,nd->n", rows_ND, rows_ND, dtype=np.float64)
        codes_NL, left_NL = encode_residual(self.codebooks_LCD, rows_ND)
        return codes_NL, length_N, left_NL


def fit(
    sample_ND: Float32Array,
    num_levels: int,
    num_codes: int,
    seed: int,
    source: dict[str, Any],
    standardize: bool = True,
) -> Codebook:
    """Train on a sample.

    Every dimension counts alike after `standardize`: features of a ReLU are close to their mean, and a few large
    dimensions would take all codes. Raises SampleError where there are fewer rows than codes."""
    if len(sample_ND) < num_codes:
        raise SampleError(
            f"{len(sample_ND):,} vectors are too few for {num_codes} codes a level; give more, or fewer --codes"
        )
    mean_D, std_D = np.zeros(sample_ND.shape[1], np.float32), np.ones(sample_ND.shape[1], np.float32)
    if standardize:
        mean_D = sample_ND.mean(axis=0, dtype=np.float64).astype(np.float32)
        std_D = sample_ND.std(axis=0, dtype=np.float64).astype(np.float32)
        std_D[std_D == 0] = 1
    codebooks_LCD = train_residual_quantizer((sample_ND - mean_D) / std_D, num_levels, num_codes, seed)
    return Codebook(codebooks_LCD, mean_D, std_D, source)


def check_source(fitted: dict[str, Any], found: dict[str, Any], path: str, accept_store: bool) -> None:
    """Refuse vectors among which the codes of a codebook do not mean what they meant where it was fitted.

    `fitted` and `found`: what the vectors of then and of now say of themselves. Features have to be of one network,
    exported vectors of one checkpoint, and both of one store, unless `accept_store`: another one of the same network,
    computed anew, say. Raises SampleError, AnotherStoreError.
    """
    then, now = ({**each, **each.get("of", {})} for each in (fitted, found))
    for name in ("extractor", "checkpoint_digest", "network"):
        if name in then and name in now and then[name] != now[name]:
            shown = "checkpoint" if name == "checkpoint_digest" else name
            raise SampleError(
                f"{path} was fitted to vectors of another {shown}: {then.get(shown)}, these are of {now.get(shown)}; "
                "fit a new one, without --codebook"
            )
    try:
        recorded, mine = SnapshotId.from_named(then), SnapshotId.from_named(now)
    except ValueError as error:
        raise SampleError(f"{path}, or the vectors, name a snapshot that no store has: {one_line(error)}") from error
    if recorded and mine and not accept_store:
        recorded.check(
            mine,
            f"the codebook {path}",
            "fit a new one, without --codebook, or, where it holds the same images computed anew, add --accept-store",
        )


def load(address: str | os.PathLike[str]) -> Codebook:
    """Load the codebook of an earlier run, from a file or an address. Raises SampleError."""
    address = os.fspath(address)
    storage, name = file_at(address)
    try:
        data = storage.read_bytes(name)
    except (OSError, StorageError) as error:
        raise SampleError(f"{address} is no codebook of this job: {error}") from error
    return Codebook.from_bytes(data, address)


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
    """Parquet files of vectors; see pipeline.vectors. A part is a slice of a file.

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


def open_file(address: str) -> FileVectors:
    """Open Parquet files of vectors. Raises VectorImportError."""
    return FileVectors(address, plan_parquet(address, None, None), _origin_of(address))


def _origin_of(address: str) -> dict[str, Any]:
    """Read the metadata of a Parquet file; nothing where it has none of export_embeddings, or is a folder."""
    storage, name = file_at(address)
    if not name.endswith(".parquet"):
        return {}
    try:
        with storage.open_input(name) as file:
            found = json.loads((pq.read_schema(file).metadata or {}).get(VECTORS_OF.encode(), b"{}"))
    except ValueError:  # another program's
        return {}
    return found if isinstance(found, dict) else {}


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


def _index(keys: list[Int64Array], prefixes: list[Int64Array], num_levels: int, num_codes: int) -> CodeIndex:
    keys_M, prefix_M = np.concatenate(keys), np.concatenate(prefixes)
    if not len(keys_M):
        raise SampleError("there is not one vector to make codes of")
    order_M = np.argsort(keys_M, kind="stable")
    keys_M, prefix_M = keys_M[order_M], prefix_M[order_M]
    if (twice := np.flatnonzero(keys_M[1:] == keys_M[:-1])).size:
        raise SampleError(f"key {keys_M[twice[0]]} has several vectors; which is its image's?")
    return CodeIndex(keys_M, prefix_M, num_levels, num_codes)
