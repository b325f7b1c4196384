"""All uses of faiss: nearest neighbours, and indexes by key.

Letters of shapes: N rows, K queries, C found of each, D width.
"""

import io
import zipfile
from typing import Any, Self

import faiss as _typed_faiss
import numpy as np

from featurestore.errors import CorruptFileError, InvalidRowsError
from featurestore.keys import AnyArray, Float32Array, Int64Array
from featurestore.problems import Problem
from featurestore.spec import IndexKind

faiss: Any = _typed_faiss  # its stubs lack some of the classes

Vectors = Float32Array

NOT_FOUND = np.float32(-np.inf)
_CLASSES: dict[IndexKind, Any] = {"flat": faiss.IndexFlat, "hnsw": faiss.IndexHNSWFlat}
_LINKS, _BUILD_EFFORT, _SEARCH_EFFORT = 32, 200, 128  # of hnsw; the inner product, no distance, needs more than usual
_LARGEST_EFFORT = 16 * _SEARCH_EFFORT
# What NumPy and faiss raise for bytes that they do not know.
_NO_INDEX = (RuntimeError, AttributeError, StopIteration, LookupError, ValueError, EOFError, zipfile.BadZipFile)


def nearest(rows_ND: Float32Array, queries_KD: Float32Array, count: int) -> AnyArray:
    """Find the `count` nearest rows of each query by Euclidean distance, nearest first, (K, count). Exact."""
    index = faiss.IndexFlatL2(rows_ND.shape[1])
    index.add(np.ascontiguousarray(rows_ND, np.float32))
    _, found = index.search(np.ascontiguousarray(queries_KD, np.float32), count)
    return np.asarray(found)


class VectorIndex:
    """An index of keys (int64) by the inner product of their vectors with a query, the largest first.

    flat looks at every vector and is exact. hnsw walks a graph and keeps `effort` candidates: it is approximate, better
    and slower with more of them.

    Under hnsw the vectors lie less their mean c. <q, x - c> is <q, x> less a number that all vectors share, so the
    order stays; but vectors that share a direction, as those of two towers do, spread round the origin again, and links
    lead to the best ones. Scores are <q, x> as ever.

    An index does not change; of other vectors another one is built.
    """

    def __init__(self, index: Any, centre_D: Vectors) -> None:
        """`index`: a faiss.IndexIDMap over one of the two; `build` and `load` make it.

        `centre_D` is subtracted from the vectors.
        """
        self._index, self._base = index, faiss.downcast_index(index.index)
        self.kind: IndexKind = next(kind for kind, each in _CLASSES.items() if isinstance(self._base, each))
        self.dim = len(centre_D)
        self._centre_D = centre_D
        self._keys_N: Int64Array = faiss.vector_to_array(index.id_map).astype(np.int64, copy=True)

    @classmethod
    def build(cls, kind: IndexKind, keys_N: Int64Array, vectors_ND: Vectors) -> Self:
        """Build an index of vectors. Order N log N for hnsw, else N.

        Raises InvalidRowsError where there is no vector, for another number of keys, for a key that comes twice, and
        for numbers that are not finite.
        """
        keys_N, vectors_ND = _checked(keys_N, vectors_ND)
        dim = vectors_ND.shape[1]
        centre_D, base = np.zeros(dim, np.float32), faiss.IndexFlatIP(dim)
        if kind != "flat":
            centre_D = vectors_ND.mean(axis=0, dtype=np.float64).astype(np.float32)
            base = faiss.IndexHNSWFlat(dim, _LINKS, faiss.METRIC_INNER_PRODUCT)
            base.hnsw.efConstruction, base.hnsw.efSearch = _BUILD_EFFORT, _SEARCH_EFFORT
        index = faiss.IndexIDMap(base)
        index.add_with_ids(vectors_ND - centre_D, keys_N)
        return cls(index, centre_D)

    @property
    def num_keys(self) -> int:
        """Number of keys that a search can find."""
        return len(self._keys_N)

    @property
    def effort(self) -> int | None:
        """Default effort of a search, saved with the index; None for flat, which has no choice."""
        return int(self._base.hnsw.efSearch) if self.kind == "hnsw" else None

    @effort.setter
    def effort(self, value: int) -> None:
        if self.kind == "hnsw":
            self._base.hnsw.efSearch = value

    @property
    def largest_effort(self) -> int | None:
        """Return the largest effort that helps; None for flat."""
        return _LARGEST_EFFORT if self.kind == "hnsw" else None

    def search(self, queries_KD: Vectors, count: int) -> tuple[Int64Array, Vectors]:
        """Find keys and inner products of the `count` largest for each query, largest first: (K, C), (K, C).

        C is `count`, or `num_keys` where that is less. An approximate index may find fewer for a query: the rest has
        the score NOT_FOUND and the key 0. Raises InvalidRowsError for queries of another width.
        """
        if queries_KD.ndim != 2 or queries_KD.shape[1] != self.dim:
            raise InvalidRowsError(Problem.WRONG_QUERY_SHAPE, queries_KD.shape, self.dim)
        if count < 1:
            raise InvalidRowsError(Problem.NOTHING_TO_FIND, count)
        found = min(count, self.num_keys)
        queries_KD = np.ascontiguousarray(queries_KD, np.float32)
        score_KC, place_KC = self._base.search(queries_KD, found)
        here_KC = place_KC >= 0
        if self.kind != "flat":
            shift_K1 = (queries_KD.astype(np.float64) @ self._centre_D)[:, None]
            score_KC = (score_KC + shift_K1).astype(np.float32)
        return np.where(here_KC, self._keys_N[place_KC], 0), np.where(here_KC, score_KC, NOT_FOUND)

    def save(self) -> bytes:
        """Return the bytes of a NumPy archive (.npz): `index`, faiss's file of an IndexIDMap, and what __init__ says.

        Another program that searches `index` by faiss alone gets the right order, with scores less <q, centre>.
        """
        file = io.BytesIO()
        np.savez(file, index=faiss.serialize_index(self._index), centre=self._centre_D)
        return file.getvalue()

    @classmethod
    def load(cls, data: bytes) -> Self:
        """Load what `save` returned: the same answers. Raises CorruptFileError for other bytes.

        faiss trusts what it reads: check a digest of the bytes first.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                return cls(faiss.deserialize_index(file["index"]), file["centre"])
        except _NO_INDEX as failure:
            raise CorruptFileError(Problem.NOT_AN_INDEX, failure) from failure


def _checked(keys_N: Int64Array, vectors_ND: Vectors) -> tuple[Int64Array, Vectors]:
    """Return keys and vectors as faiss takes them. Raises InvalidRowsError."""
    if vectors_ND.ndim != 2 or 0 in vectors_ND.shape:
        raise InvalidRowsError(Problem.WRONG_VECTOR_SHAPE, vectors_ND.shape)
    if keys_N.shape != (len(vectors_ND),) or keys_N.dtype != np.int64:
        raise InvalidRowsError(Problem.WRONG_VECTOR_KEYS, keys_N.dtype, keys_N.shape, len(vectors_ND))
    if len(np.unique(keys_N)) < len(keys_N):
        raise InvalidRowsError(Problem.KEY_GIVEN_TWICE)
    vectors_ND = np.ascontiguousarray(vectors_ND, np.float32)
    if (wrong := np.flatnonzero(~np.isfinite(vectors_ND).all(axis=1))).size:
        raise InvalidRowsError(Problem.VECTOR_NOT_FINITE, keys_N[wrong[0]])
    return np.ascontiguousarray(keys_N), vectors_ND
