"""An index of ads on a disk or object store: versions, each made of whole files and published by one exclusive create.

    ad-index/
      index-00000002.json               version 2: what it was made of, and the files below with their digests
      ads-00000001-<random>.parquet     key, vector (fixed-size binary of float32): what each build or addition computed
      ads-00000002-<random>.parquet     a later file's vector of a key counts
      ads-00000002-<random>.faiss       faiss's own format

The highest version counts. The one before it stays, for readers that have just opened it; older ones are removed.
Letters of shapes: N ads, W width of the vectors.
"""

import contextlib
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from featurestore.datafile import digest_of, read_verified
from featurestore.errors import CorruptFileError
from featurestore.identity import SnapshotId
from featurestore.index import IndexKind, VectorIndex
from featurestore.spec import FORMAT_VERSION, seal, unseal
from featurestore.storage import Storage
from trainer.errors import AdIndexError

KEY, VECTOR = "key", "vector"
_METADATA = re.compile(r"index-(\d{8,})\.json")
_PART = re.compile(r"ads-(\d{8,})-[0-9a-f]{32}\.(parquet|faiss)")
# Batches of another make-up move the last bits of a vector; what is nearer than this is the same.
_SAME = 1e-5

Keys = NDArray[np.int64]
Vectors = NDArray[np.float32]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class IndexOrigin(_Frozen):
    """Whose vectors these are. Vectors of two checkpoints cannot be compared, so one index has those of one."""

    run: str
    checkpoint: str
    checkpoint_digest: str
    key_column: str
    """Column of the samples, or of the table of ads, whose values are the keys."""
    bias: float
    """Logit = inner product + bias + what the context of the impression adds."""
    stores: dict[str, SnapshotId] = {}
    """Where the images were looked up, by the store's name. An index from before they were kept has none."""

    @model_serializer(mode="wrap")
    def _as_written(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        return fields if self.stores else {name: value for name, value in fields.items() if name != "stores"}


class PartFile(_Frozen):
    """One file of an index."""

    path: str
    sha256: str


class IndexState(_Frozen):
    """index-N.json."""

    format_version: int = FORMAT_VERSION
    version: int
    kind: IndexKind
    metric: Literal["inner_product"] = "inner_product"
    dim: int
    num_ads: int
    num_replaced: int
    origin: IndexOrigin
    index: PartFile
    vectors: tuple[PartFile, ...]


@dataclass(frozen=True)
class Added:
    """What an addition did: ads that were not there, that got another vector, and that had the same one already."""

    num_new: int
    num_replaced: int
    num_unchanged: int


class AdIndex:
    """One version of an index, open: its state and faiss's structure in memory."""

    def __init__(self, storage: Storage, state: IndexState, index: VectorIndex) -> None:
        self._storage, self.state, self.index = storage, state, index

    @classmethod
    def build(cls, url: str, kind: IndexKind, keys_N: Keys, vectors_NW: Vectors, origin: IndexOrigin) -> "AdIndex":
        """A new index at `url`, as the version after the one that is there.

        Raises InvalidRowsError for vectors that make no index, AdIndexError, StorageError.
        """
        storage, index = Storage(url), VectorIndex.build(kind, keys_N, vectors_NW)
        version = max(_versions(storage), default=0) + 1
        return _publish(storage, version, index, origin, [], (keys_N, vectors_NW))

    @classmethod
    def open(cls, url: str) -> "AdIndex":
        """The newest version at `url`. Raises AdIndexError, CorruptFileError, StorageError."""
        storage = Storage(url)
        versions = _versions(storage)
        if not versions:
            raise AdIndexError(
                f"{url} is no index of ads; make it with: python jobs/build_ad_index.py --run RUN --out {url}"
            )
        state = _read_state(storage, versions[-1])
        index = VectorIndex.load(_read(storage, state.index))
        if (index.kind, index.dim, index.num_keys) != (state.kind, state.dim, state.num_ads):
            raise CorruptFileError(f"{storage.full(state.index.path)} is not the index that its version describes")
        return cls(storage, state, index)

    def check_origin(self, origin: IndexOrigin) -> None:
        """Raises AdIndexError where the index has vectors of another checkpoint, and AnotherStoreError where it has
        vectors of images that were looked up in another store."""
        mine = self.state.origin
        if mine.checkpoint_digest != origin.checkpoint_digest:
            raise AdIndexError(
                f"{self._storage.url} has vectors of checkpoint {mine.checkpoint} of run {mine.run}, and not of "
                f"{origin.checkpoint} of run {origin.run}: they cannot be compared; name that checkpoint by "
                "--checkpoint, or build the index anew, without --add"
            )
        for name in mine.stores.keys() & origin.stores.keys():
            mine.stores[name].check(
                origin.stores[name], f"the index {self._storage.url}", "build the index anew, without --add"
            )

    def vectors(self) -> tuple[Keys, Vectors]:
        """Keys, ascending, and vectors of all ads, (N,) and (N, W). Raises CorruptFileError."""
        parts = [_parse(_read(self._storage, part), self.state.dim, part.path) for part in self.state.vectors]
        keys_N = np.concatenate([keys for keys, _ in parts])
        first_N = np.unique(keys_N[::-1], return_index=True)[1]
        last_N = len(keys_N) - 1 - first_N
        return keys_N[last_N], np.concatenate([vectors for _, vectors in parts])[last_N]

    def add(self, keys_N: Keys, vectors_NW: Vectors, origin: IndexOrigin) -> tuple["AdIndex", Added]:
        """The next version, with these ads too; only vectors that are new or differ are appended.

        Nothing is built anew; this object must not be used any more. Raises AdIndexError, InvalidRowsError,
        StorageError.
        """
        self.check_origin(origin)
        known_K, old_KW = self.vectors()
        place_N = np.searchsorted(known_K, keys_N).clip(max=len(known_K) - 1)
        is_known_N = known_K[place_N] == keys_N
        if vectors_NW.shape[1:] == old_KW.shape[1:]:
            same_N = is_known_N & np.isclose(old_KW[place_N], vectors_NW, rtol=_SAME, atol=_SAME).all(axis=1)
        else:
            same_N = np.zeros(len(keys_N), np.bool_)  # the index refuses them
        changed = keys_N[~same_N], vectors_NW[~same_N]
        added = Added(int((~is_known_N).sum()), int((is_known_N & ~same_N).sum()), int(same_N.sum()))
        if not len(changed[0]):
            return self, added
        self.index.add(*changed)
        version = self.state.version + 1
        return _publish(self._storage, version, self.index, origin, self.state.vectors, changed), added


def _versions(storage: Storage) -> list[int]:
    """Published versions, ascending."""
    return sorted(int(match[1]) for name in storage.list() if (match := _METADATA.fullmatch(name)))


def _read_state(storage: Storage, version: int) -> IndexState:
    name = f"index-{version:08}.json"
    try:
        return unseal(storage.read_bytes(name), IndexState, storage.full(name))
    except FileNotFoundError as failure:
        raise AdIndexError(f"{storage.full(name)} was replaced meanwhile; run again") from failure


def _read(storage: Storage, part: PartFile) -> bytes:
    """The whole file, its digest verified. Raises CorruptFileError."""
    try:
        return read_verified(storage, part.path, "sha256", part.sha256)
    except FileNotFoundError as failure:
        raise CorruptFileError(f"{storage.full(part.path)} is missing") from failure


def _publish(
    storage: Storage,
    version: int,
    index: VectorIndex,
    origin: IndexOrigin,
    earlier: Sequence[PartFile],
    computed: tuple[Keys, Vectors],
) -> AdIndex:
    """Writes the files, then the version that names them; removes what no reader needs any more."""
    name = f"ads-{version:08}-{uuid.uuid4().hex}"
    vectors = _write(storage, f"{name}.parquet", _parquet(*computed))
    state = IndexState(
        version=version,
        kind=index.kind,
        dim=index.dim,
        num_ads=index.num_keys,
        num_replaced=index.num_replaced,
        origin=origin,
        index=_write(storage, f"{name}.faiss", index.save()),
        vectors=(*earlier, vectors),
    )
    data, path = seal(state), f"index-{version:08}.json"
    if storage.create_or_read(path, data) != data:
        storage.delete_files([state.index.path, vectors.path])
        raise AdIndexError(f"{storage.full(path)} was written by another build meanwhile; run again")
    _clean(storage, state)
    return AdIndex(storage, state, index)


def _write(storage: Storage, path: str, data: bytes) -> PartFile:
    storage.write_bytes(path, data)
    return PartFile(path=path, sha256=digest_of(data, "sha256"))


def _clean(storage: Storage, state: IndexState) -> None:
    """Removes versions before the last two, and files up to this version that neither of those names."""
    kept = [state]
    with contextlib.suppress(AdIndexError, CorruptFileError):
        kept.append(_read_state(storage, state.version - 1))
    needed = {part.path for each in kept for part in (each.index, *each.vectors)}
    old = [f"index-{version:08}.json" for version in _versions(storage) if version < state.version - 1]
    for name in storage.list():
        match = _PART.fullmatch(name)
        if match and int(match[1]) <= state.version and name not in needed:
            old.append(name)
    storage.delete_files(old)


def _parquet(keys_N: Keys, vectors_NW: Vectors) -> bytes:
    """Columns key and vector; dtype and shape of the vector stand in its field's metadata."""
    width = vectors_NW.shape[1]
    values = pa.py_buffer(np.ascontiguousarray(vectors_NW, np.float32).tobytes())
    vector = pa.FixedSizeBinaryArray.from_buffers(pa.binary(4 * width), len(keys_N), [None, values])
    field = pa.field(VECTOR, vector.type, nullable=False)
    schema = pa.schema(
        [
            pa.field(KEY, pa.int64(), nullable=False),
            field.with_metadata({"dtype": "float32", "shape": f"[{width}]"}),
        ]
    )
    sink = pa.BufferOutputStream()
    columns: list[Any] = [pa.array(keys_N), vector]
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), sink, compression="lz4", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def _parse(data: bytes, width: int, path: str) -> tuple[Keys, Vectors]:
    """Undoes `_parquet`."""
    table = pq.read_table(pa.BufferReader(data)).combine_chunks()
    vector: Any = table[VECTOR].combine_chunks()
    if vector.type != pa.binary(4 * width):
        raise CorruptFileError(f"{path} has vectors of {vector.type}, not {width} numbers of float32")
    values = np.frombuffer(vector.buffers()[1], np.float32).reshape(-1, width)
    return table[KEY].to_numpy(), values[vector.offset : vector.offset + len(vector)]
