"""Ad indexes: files of vectors and faiss indexes, published, and their recall.

Letters of shapes: N ads, K queries, C candidates found of each, W width of the vectors.

ad-index/
      index-00000002.json               version 2: what it was made of, and the files below with their digests
      ads-00000001-<random>.parquet     key, vector (fixed-size binary of float32): what each build or addition computed
      ads-00000002-<random>.parquet     a later file's vector of a key counts; a key without one was removed
      ads-00000002-<random>.npz         the structure of faiss, by featurestore.index
      queries-00000001-<random>.parquet vectors that recall is measured with; not with flat, which is exact

The highest version counts. The one before it stays, for readers that have just opened it; older ones are removed.
Letters of shapes: N ads or rows, R removed ads, W width of the vectors.
"""

import contextlib
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from featurestore.errors import CorruptFileError
from featurestore.format.datafile import digest_of, read_verified
from featurestore.identity import SnapshotId
from featurestore.index import VectorIndex
from featurestore.spec import FORMAT_VERSION, FileName, IndexKind, seal, unseal
from featurestore.storage.storage import Storage
from trainer.errors import AdIndexError, AdIndexNotFoundError
from trainer.prerank import MAX_GONE, MIN_RECALL

Keys = NDArray[np.int64]
Vectors = NDArray[np.float32]
QuerySource = Literal["users", "ads"]

COUNT = 10  # candidates of a query whose recall is measured when an index is written
NUM_QUERIES = 500
# Scores of two structures differ in the last bits; what is nearer than this is as good.
_TIE = 1e-5


@dataclass(frozen=True)
class Queries:
    """What an index is measured with: vectors of users, or of some of its own ads where there are no users."""

    vectors_KW: Vectors
    source: QuerySource


def sample_of(vectors_NW: Vectors, source: QuerySource) -> Queries:
    """Draw at most NUM_QUERIES of these vectors by a fixed seed."""
    chosen_K = np.random.default_rng(0).permutation(len(vectors_NW))[:NUM_QUERIES]
    return Queries(np.ascontiguousarray(vectors_NW[np.sort(chosen_K)]), source)


def recall_at(
    index: VectorIndex, exact: VectorIndex, queries_KW: Vectors, count: int, effort: int | None = None
) -> float:
    """Measure the share of the `count` best of `exact`, a flat index of the same ads, that `index` finds; K >= 1.

    An ad whose score is that of the last of the best is one of them: ads with equal vectors must not count as misses.
    """
    _, best_KC = exact.search(queries_KW, count)
    _, found_KC = index.search(queries_KW, count, effort)
    last_K1 = best_KC[:, : found_KC.shape[1]][:, -1:]
    return float((found_KC >= last_K1 - _TIE * np.abs(last_K1)).mean())


def best_index(
    kind: IndexKind, keys_N: Keys, vectors_NW: Vectors, exact: VectorIndex, queries: Queries, limit: float
) -> tuple[VectorIndex, float]:
    """Build an index of these ads whose recall@COUNT is `limit`, or as near as it gets; returns that recall too.

    Where hnsw is below it, its graph in the other space is tried too, and the better one taken: which of the two finds
    more depends on the vectors.
    """
    index = VectorIndex.build(kind, keys_N, vectors_NW)
    recall = reach(index, exact, queries, 0)
    if kind == "hnsw" and recall < limit:
        lifted = VectorIndex.build(kind, keys_N, vectors_NW, lifted=True)
        if reach(lifted, exact, queries, 0) > recall:
            index = lifted
    return index, reach(index, exact, queries, limit)


def reach(index: VectorIndex, exact: VectorIndex, queries: Queries, limit: float) -> float:
    """Measure recall@COUNT of the index, whose effort is doubled while that is below `limit` and more effort helps."""
    recall = recall_at(index, exact, queries.vectors_KW, COUNT)
    while recall < limit and index.effort and index.largest_effort and index.effort < index.largest_effort:
        index.effort = min(2 * index.effort, index.largest_effort)
        recall = recall_at(index, exact, queries.vectors_KW, COUNT)
    return recall


_MAX_UNUSED = 0.25
_OTHERS: dict[IndexKind, str] = {"hnsw": "ivf or flat", "ivf": "flat", "flat": "flat"}
_METADATA = re.compile(r"index-(\d{8,})\.json")
_PART = re.compile(r"(?:ads|queries)-(\d{8,})-[0-9a-f]{32}\.(?:parquet|npz)")
# Batches of another make-up move the last bits of a vector; what is nearer than this is the same.
_SAME = 1e-5

_NONE: Keys = np.empty(0, np.int64)


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
    """Where the images were looked up, by the store's name; empty for a model without images."""


class PartFile(_Frozen):
    """One file of an index."""

    path: FileName
    sha256: str


class QueryFile(_Frozen):
    """Vectors that the recall of an approximate index is measured with."""

    file: PartFile
    source: QuerySource


class IndexState(_Frozen):
    """The content of index-N.json, which describes a version of an index of ads."""

    format_version: int = FORMAT_VERSION
    version: int
    kind: IndexKind
    metric: Literal["inner_product"] = "inner_product"
    dim: int
    num_ads: int
    num_unused: int
    """Vectors of ads that were removed or have another one now: searches pass over them."""
    recall: float
    """Recall@10 against exact search, of a search with the index's own effort."""
    min_recall: float
    origin: IndexOrigin
    index: PartFile
    vectors: tuple[PartFile, ...]
    queries: QueryFile | None


@dataclass(frozen=True, kw_only=True)
class AdChanges:
    """The numbers of ads that a new version added, changed, left and removed.

    They are ads that were not there, that got another vector, that had the same one already, that are gone, and that
    were to be removed and were not there. `is_rebuilt`: the structure was built anew for it.
    """

    num_new: int = 0
    num_replaced: int = 0
    num_unchanged: int = 0
    num_removed: int = 0
    num_unknown: int = 0
    is_rebuilt: bool = False


class AdIndex:
    """One version of an index, open: its state and faiss's structure in memory."""

    def __init__(self, storage: Storage, state: IndexState, index: VectorIndex) -> None:
        self._storage, self.state, self.index = storage, state, index

    @classmethod
    def build(
        cls,
        url: str,
        kind: IndexKind,
        keys_N: Keys,
        vectors_NW: Vectors,
        origin: IndexOrigin,
        queries: Queries | None = None,
        min_recall: float = MIN_RECALL,
    ) -> "AdIndex":
        """Build a new index at `url`, as the version after the one that is there.

        Of ivf and hnsw the recall is measured with `queries`, without them with some of the ads, and the effort of a
        search is raised until it is `min_recall`; `warning` says where it never is. Raises InvalidRowsError for vectors
        that make no index, AdIndexError, StorageError.
        """
        storage, index = Storage(url), VectorIndex.build("flat", keys_N, vectors_NW)
        recall, query_file, version = 1.0, None, max(_versions(storage), default=0) + 1
        if kind != "flat":
            queries = queries or sample_of(vectors_NW, "ads")
            index, recall = best_index(kind, keys_N, vectors_NW, index, queries, min_recall)
            data = to_parquet(np.arange(len(queries.vectors_KW)), queries.vectors_KW)
            query_file = QueryFile(file=_write(storage, _name("queries", version), data), source=queries.source)
        vectors = _write(storage, _name("ads", version), to_parquet(keys_N, vectors_NW))
        draft = _Draft(version, origin, recall, min_recall, (vectors,), query_file)
        return _publish(storage, index, draft)

    @classmethod
    def open(cls, url: str) -> "AdIndex":
        """Open the newest version at `url`. Raises AdIndexError, CorruptFileError, StorageError."""
        storage = Storage(url)
        versions = _versions(storage)
        if not versions:
            raise AdIndexNotFoundError(
                f"{url} is no index of ads; make it with: python jobs/build_ad_index.py --run RUN --out {url}"
            )
        state = _read_state(storage, versions[-1])
        index = VectorIndex.load(_read(storage, state.index))
        if (index.kind, index.dim, index.num_keys) != (state.kind, state.dim, state.num_ads):
            raise CorruptFileError(f"{storage.full(state.index.path)} is not the index that its version describes")
        return cls(storage, state, index)

    @property
    def warning(self) -> str | None:
        """One line where the index finds fewer of the best ads than it should."""
        state = self.state
        if state.recall >= state.min_recall:
            return None
        return (
            f"recall@{COUNT} of this {state.kind} index is {state.recall:.3f}, below the limit of {state.min_recall:g},"
            f" with the largest effort ({self.index.effort}) too: take --index {_OTHERS[state.kind]}"
        )

    def check_origin(self, origin: IndexOrigin) -> None:
        """Check whose vectors these are.

        Raises AdIndexError where they are of another checkpoint, and AnotherStoreError where their images were looked
        up in another store."""
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
        """Read keys, ascending, and vectors of all ads, (N,) and (N, W). Raises CorruptFileError."""
        files = self.state.vectors
        return merge([from_parquet(_read(self._storage, each), self.state.dim, each.path) for each in files])

    def add(self, keys_N: Keys, vectors_NW: Vectors, origin: IndexOrigin) -> tuple["AdIndex", AdChanges]:
        """Write the next version, with these ads too; only vectors that are new or differ are appended.

        Nothing is built anew, unless recall would be below the limit, or more than a quarter of the vectors unused.
        This object must not be used any more. Raises AdIndexError, InvalidRowsError, StorageError.
        """
        self.check_origin(origin)
        return self._change(keys_N, vectors_NW, _NONE, origin)

    def remove(self, keys_R: Keys) -> tuple["AdIndex", AdChanges]:
        """Write the next version, without these ads; those that are not there are counted. Otherwise as `add`."""
        return self._change(_NONE, np.empty((0, self.state.dim), np.float32), keys_R, self.state.origin)

    def sync(
        self, keys_N: Keys, vectors_NW: Vectors, origin: IndexOrigin, max_gone: float = MAX_GONE
    ) -> tuple["AdIndex", AdChanges]:
        """Write the next version, with these ads alone. Otherwise as `add`.

        Raises AdIndexError too where more than a share of `max_gone` of the ads would go: a table may be cut short.
        """
        self.check_origin(origin)
        known_K, _ = self.vectors()
        gone_R = np.setdiff1d(known_K, keys_N)
        if len(gone_R) > max_gone * len(known_K):
            raise AdIndexError(
                f"{len(gone_R):,} of the {len(known_K):,} ads in {self._storage.url} are not in the table, more than a"
                f" share of {max_gone:g}: is --sync right? --max-gone 1 lets them go"
            )
        return self._change(keys_N, vectors_NW, gone_R, origin)

    def _change(
        self, keys_N: Keys, vectors_NW: Vectors, removed_R: Keys, origin: IndexOrigin
    ) -> tuple["AdIndex", AdChanges]:
        known_K, old_KW = self.vectors()
        place_N = np.searchsorted(known_K, keys_N).clip(max=len(known_K) - 1)
        is_known_N = known_K[place_N] == keys_N
        if vectors_NW.shape[1:] == old_KW.shape[1:]:
            same_N = is_known_N & np.isclose(old_KW[place_N], vectors_NW, rtol=_SAME, atol=_SAME).all(axis=1)
        else:
            same_N = np.zeros(len(keys_N), np.bool_)  # the index refuses them
        new_N, new_NW = keys_N[~same_N], vectors_NW[~same_N]
        removed_R = np.unique(removed_R)
        gone_R = removed_R[np.isin(removed_R, known_K)]
        changes = AdChanges(
            num_new=int((~is_known_N).sum()),
            num_replaced=int((is_known_N & ~same_N).sum()),
            num_unchanged=int(same_N.sum()),
            num_removed=len(gone_R),
            num_unknown=len(removed_R) - len(gone_R),
        )
        if not len(new_N) and not len(gone_R):
            return self, changes
        self.index.add(new_N, new_NW)
        self.index.remove(gone_R)
        kept_K = ~np.isin(known_K, np.concatenate([new_N, gone_R]))
        ads = np.concatenate([known_K[kept_K], new_N]), np.concatenate([old_KW[kept_K], new_NW])
        return self._next(ads, to_parquet(new_N, new_NW, gone_R), changes, origin)

    def _next(
        self, ads: tuple[Keys, Vectors], part: bytes, changes: AdChanges, origin: IndexOrigin
    ) -> tuple["AdIndex", AdChanges]:
        """Publishes this object's structure, which has `ads` now, `part` being what is new; or another, built anew."""
        state, index, recall = self.state, self.index, 1.0
        version, earlier = state.version + 1, state.vectors
        exact, queries = VectorIndex.build("flat", *ads), self._queries()
        if queries:
            recall = reach(index, exact, queries, 0)
        is_worse = recall < state.min_recall <= state.recall
        if is_worse or index.num_unused > _MAX_UNUSED * (index.num_unused + index.num_keys):
            index, earlier, part = exact, (), to_parquet(*ads)
            changes = replace(changes, is_rebuilt=True)
            if queries:
                index, recall = best_index(state.kind, *ads, exact, queries, state.min_recall)
        elif queries:
            recall = reach(index, exact, queries, state.min_recall)
        vectors = _write(self._storage, _name("ads", version), part)
        draft = _Draft(version, origin, recall, state.min_recall, (*earlier, vectors), state.queries)
        return _publish(self._storage, index, draft), changes

    def _queries(self) -> Queries | None:
        """What recall is measured with; None for flat."""
        queries = self.state.queries
        if not queries:
            return None
        data = _read(self._storage, queries.file)
        return Queries(from_parquet(data, self.state.dim, queries.file.path)[1], queries.source)


def _versions(storage: Storage) -> list[int]:
    """Published versions, ascending."""
    return sorted(int(match[1]) for name in storage.list() if (match := _METADATA.fullmatch(name)))


def _read_state(storage: Storage, version: int) -> IndexState:
    name = f"index-{version:08}.json"
    try:
        data = storage.read_bytes(name)
    except FileNotFoundError as failure:
        raise AdIndexError(f"{storage.full(name)} was replaced meanwhile; run again") from failure
    return unseal(data, IndexState, storage.full(name))


def _read(storage: Storage, part: PartFile) -> bytes:
    """The whole file, its digest verified. Raises CorruptFileError."""
    try:
        return read_verified(storage, part.path, "sha256", part.sha256)
    except FileNotFoundError as failure:
        raise CorruptFileError(f"{storage.full(part.path)} is missing") from failure


@dataclass(frozen=True)
class _Draft:
    """Of a version to be published: all that its structure does not say."""

    version: int
    origin: IndexOrigin
    recall: float
    min_recall: float
    vectors: tuple[PartFile, ...]
    queries: QueryFile | None


def _publish(storage: Storage, index: VectorIndex, draft: _Draft) -> AdIndex:
    """Writes the structure, then the version that names all files; removes what no reader needs any more."""
    state = IndexState(
        **vars(draft),
        kind=index.kind,
        dim=index.dim,
        num_ads=index.num_keys,
        num_unused=index.num_unused,
        index=_write(storage, _name("ads", draft.version, "npz"), index.save()),
    )
    data, path = seal(state), f"index-{state.version:08}.json"
    if storage.create_or_read(path, data) != data:
        mine = [part.path for part in _parts(state) if int(part.path.split("-")[1]) == state.version]
        storage.delete_files(mine)
        raise AdIndexError(f"{storage.full(path)} was written by another build meanwhile; run again")
    _clean(storage, state)
    return AdIndex(storage, state, index)


def _name(what: str, version: int, suffix: str = "parquet") -> str:
    return f"{what}-{version:08}-{uuid.uuid4().hex}.{suffix}"


def _write(storage: Storage, path: str, data: bytes) -> PartFile:
    storage.write_bytes(path, data)
    return PartFile(path=path, sha256=digest_of(data, "sha256"))


def _parts(state: IndexState) -> list[PartFile]:
    """All files that a version names."""
    return [state.index, *state.vectors, *([state.queries.file] if state.queries else [])]


def _clean(storage: Storage, state: IndexState) -> None:
    """Removes versions before the last two, and files up to this version that neither of those names."""
    kept = [state]
    with contextlib.suppress(AdIndexError, CorruptFileError):
        kept.append(_read_state(storage, state.version - 1))
    needed = {part.path for each in kept for part in _parts(each)}
    old = [f"index-{version:08}.json" for version in _versions(storage) if version < state.version - 1]
    for name in storage.list():
        match = _PART.fullmatch(name)
        if match and int(match[1]) <= state.version and name not in needed:
            old.append(name)
    storage.delete_files(old)


KEY, VECTOR = "key", "vector"
Mask = NDArray[np.bool_]


def to_parquet(keys_N: Keys, vectors_NW: Vectors, removed_R: Keys | None = None) -> bytes:
    """Write columns key and vector, removed keys last; dtype and shape of the vector are in its field's metadata."""
    width, removed_R = vectors_NW.shape[1], np.empty(0, np.int64) if removed_R is None else removed_R
    values = np.concatenate([vectors_NW, np.zeros((len(removed_R), width), np.float32)]).astype(np.float32)
    has_vector_N = np.arange(len(values)) < len(keys_N)
    valid = pa.array(has_vector_N).buffers()[1] if len(removed_R) else None
    vector = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(4 * width), len(values), [valid, pa.py_buffer(values.tobytes())]
    )
    field = pa.field(VECTOR, vector.type)
    schema = pa.schema(
        [
            pa.field(KEY, pa.int64(), nullable=False),
            field.with_metadata({"dtype": "float32", "shape": f"[{width}]"}),
        ]
    )
    sink = pa.BufferOutputStream()
    columns: list[Any] = [pa.array(np.concatenate([keys_N, removed_R])), vector]
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), sink, compression="lz4", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def from_parquet(data: bytes, width: int, path: str) -> tuple[Keys, Vectors, Mask]:
    """Read what `to_parquet` wrote: keys (N,), vectors (N, W), and which rows have one (N,).

    Raises CorruptFileError.
    """
    table = pq.read_table(pa.BufferReader(data)).combine_chunks()
    vector: Any = table[VECTOR].combine_chunks()
    if vector.type != pa.binary(4 * width):
        raise CorruptFileError(f"{path} has vectors of {vector.type}, not {width} numbers of float32")
    has_vector_N = vector.is_valid().to_numpy(zero_copy_only=False)
    values = np.frombuffer(vector.buffers()[1], np.float32).reshape(-1, width)
    return table[KEY].to_numpy(), values[vector.offset : vector.offset + len(vector)], has_vector_N


def merge(parts: Sequence[tuple[Keys, Vectors, Mask]]) -> tuple[Keys, Vectors]:
    """Merge several files, oldest first, into keys, ascending, and their vectors."""
    keys_N, vectors_NW, has_vector_N = (np.concatenate(each) for each in zip(*parts, strict=True))
    last_M = len(keys_N) - 1 - np.unique(keys_N[::-1], return_index=True)[1]
    last_M = last_M[has_vector_N[last_M]]
    return keys_N[last_M], vectors_NW[last_M]
