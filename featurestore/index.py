"""All uses of faiss: nearest neighbours, and indexes by key.

Letters of shapes: N rows, K queries, C found of each, D width.
"""

import io
import zipfile
from typing import Any, Self

import faiss as _typed_faiss
import numpy as np

from featurestore.errors import CorruptFileError, InvalidRowsError
from featurestore.keys import AnyArray, Float32Array, Float64Array, Int64Array
from featurestore.spec import IndexKind

faiss: Any = _typed_faiss  # its stubs lack some of the classes

Vectors = Float32Array

NOT_FOUND = np.float32(-np.inf)
_LARGEST_CODE = 255
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
    lead to the best ones. Scores are <q, x> as ever. The graph can also be of the space of one more dimension in which
    all vectors are equally long and the nearest have the largest inner product (`lifted`; Bachrach et al. 2014,
    "Speeding Up the Xbox Recommender System"): on some vectors it finds much more then; on others, as of very unequal
    lengths, much less: measure.

    An index does not change; of other vectors another one is built.
    """

    def __init__(self, index: Any, centre_D: Vectors, radius: float) -> None:
        """`index`: a faiss.IndexIDMap over one of the two; `build` and `load` make it.

        `centre_D` is what the vectors lie less, `radius` the length of the longest of them then.
        """
        self._index, self._base = index, faiss.downcast_index(index.index)
        self.kind: IndexKind = next(kind for kind, each in _CLASSES.items() if isinstance(self._base, each))
        self.dim = len(centre_D)
        self._centre_D, self._radius = centre_D, radius
        self._is_lifted = self._base.d > self.dim
        self._keys_N: Int64Array = faiss.vector_to_array(index.id_map).astype(np.int64, copy=True)

    @classmethod
    def build(cls, kind: IndexKind, keys_N: Int64Array, vectors_ND: Vectors, lifted: bool = False) -> Self:
        """Build an index of vectors. Order N log N for hnsw, else N. `lifted` is for hnsw.

        Raises InvalidRowsError where there is no vector, for another number of keys, for a key that comes twice, and
        for numbers that are not finite.
        """
        keys_N, vectors_ND = _checked(keys_N, vectors_ND)
        dim = vectors_ND.shape[1]
        centre_D = np.zeros(dim, np.float32)
        if kind != "flat":
            centre_D = vectors_ND.mean(axis=0, dtype=np.float64).astype(np.float32)
        radius = float(np.sqrt(_squares(vectors_ND - centre_D).max()))
        index = faiss.IndexIDMap(_empty(kind, dim, lifted))
        stored_ND = vectors_ND - centre_D
        if lifted:
            rest_N1 = np.sqrt(np.maximum(radius**2 - _squares(stored_ND), 0))[:, None]
            stored_ND = np.hstack([stored_ND, rest_N1.astype(np.float32)])
        index.add_with_ids(stored_ND, keys_N)
        return cls(index, centre_D, radius)

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
        """More than this helps no more; None for flat."""
        return _LARGEST_EFFORT if self.kind == "hnsw" else None

    def search(self, queries_KD: Vectors, count: int) -> tuple[Int64Array, Vectors]:
        """Find keys and inner products of the `count` largest for each query, largest first: (K, C), (K, C).

        C is `count`, or `num_keys` where that is less. An approximate index may find fewer for a query: the rest has
        the score NOT_FOUND and the key 0. Raises InvalidRowsError for queries of another width.
        """
        if queries_KD.ndim != 2 or queries_KD.shape[1] != self.dim:
            raise InvalidRowsError(f"queries of shape {queries_KD.shape} do not fit an index of width {self.dim}")
        if count < 1:
            raise InvalidRowsError(f"count={count}: a search is for at least one key")
        found = min(count, self.num_keys)
        queries_KD = np.ascontiguousarray(queries_KD, np.float32)
        asked_KD, length_K1 = self._asked(queries_KD)
        score_KC, place_KC = self._base.search(asked_KD, found)
        if self._base.metric_type == faiss.METRIC_L2:
            score_KC, place_KC = self._by_product(asked_KD, place_KC)
        here_KC = place_KC >= 0
        if self.kind != "flat":
            shift_K1 = (queries_KD.astype(np.float64) @ self._centre_D)[:, None]
            score_KC = (score_KC * length_K1 + shift_K1).astype(np.float32)
        return np.where(here_KC, self._keys_N[place_KC], 0), np.where(here_KC, score_KC, NOT_FOUND)

    def save(self) -> bytes:
        """Return the bytes of a NumPy archive (.npz): `index`, faiss's file of an IndexIDMap, and what __init__ says.

        Another program that searches `index` by faiss alone gets the right order, with scores less <q, centre>; to the
        queries of a lifted hnsw it appends a zero, and gets distances.
        """
        file = io.BytesIO()
        index, radius = faiss.serialize_index(self._index), np.float64(self._radius)
        np.savez(file, index=index, centre=self._centre_D, radius=radius)
        return file.getvalue()

    @classmethod
    def load(cls, data: bytes) -> Self:
        """Load what `save` returned: the same answers. Raises CorruptFileError for other bytes.

        faiss trusts what it reads: check a digest of the bytes first.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                index = faiss.deserialize_index(file["index"])
                return cls(index, file["centre"], float(file["radius"]))
        except _NO_INDEX as failure:
            raise CorruptFileError(f"not an index that this code wrote: {failure}") from failure

    def _asked(self, queries_KD: Vectors) -> tuple[Vectors, Float64Array]:
        """Return the queries as faiss has them, and what its scores are multiplied with, (K, 1).

        To a lifted hnsw all are as long as its vectors: which are nearest depends on it.
        """
        if not self._is_lifted:
            return queries_KD, np.ones((len(queries_KD), 1))
        length_K1 = np.sqrt(_squares(queries_KD))[:, None] / (self._radius or 1)
        length_K1[length_K1 == 0] = 1
        scaled_KD = (queries_KD / length_K1).astype(np.float32)
        return np.hstack([scaled_KD, np.zeros((len(queries_KD), 1), np.float32)]), length_K1

    def _by_product(self, asked_KD: Vectors, place_KC: Int64Array) -> tuple[Vectors, Int64Array]:
        """Return inner products of the found vectors with the queries, largest first, and their places.

        Of distances the last bits would be lost."""
        found_KCD = self._base.reconstruct_batch(place_KC.clip(min=0).ravel()).reshape(*place_KC.shape, -1)
        score_KC = np.einsum("kd,kcd->kc", asked_KD, found_KCD, dtype=np.float64)
        score_KC[place_KC < 0] = NOT_FOUND
        order_KC = np.argsort(-score_KC, axis=1, kind="stable")
        return np.take_along_axis(score_KC, order_KC, 1), np.take_along_axis(place_KC, order_KC, 1)


def _empty(kind: IndexKind, dim: int, lifted: bool) -> Any:
    if kind == "flat":
        return faiss.IndexFlatIP(dim)
    base = faiss.IndexHNSWFlat(dim + lifted, _LINKS, faiss.METRIC_L2 if lifted else faiss.METRIC_INNER_PRODUCT)
    base.hnsw.efConstruction, base.hnsw.efSearch = _BUILD_EFFORT, _SEARCH_EFFORT
    return base


def _squares(vectors_ND: Vectors) -> Float64Array:
    """Return the squared length of each vector, (N,)."""
    return np.asarray(np.einsum("nd,nd->n", vectors_ND, vectors_ND, dtype=np.float64))


def _checked(keys_N: Int64Array, vectors_ND: Vectors) -> tuple[Int64Array, Vectors]:
    """Return keys and vectors as faiss takes them. Raises InvalidRowsError."""
    if vectors_ND.ndim != 2 or 0 in vectors_ND.shape:
        raise InvalidRowsError(
            f"vectors of shape {vectors_ND.shape} make no index; give (N, D) with at least one row and one number"
        )
    if keys_N.shape != (len(vectors_ND),) or keys_N.dtype != np.int64:
        raise InvalidRowsError(
            f"keys {keys_N.dtype}{keys_N.shape}: each of {len(vectors_ND)} vectors needs an int64 key"
        )
    if len(np.unique(keys_N)) < len(keys_N):
        raise InvalidRowsError("a key comes twice; give one vector of each")
    vectors_ND = np.ascontiguousarray(vectors_ND, np.float32)
    if (wrong := np.flatnonzero(~np.isfinite(vectors_ND).all(axis=1))).size:
        raise InvalidRowsError(f"the vector of key {keys_N[wrong[0]]} has numbers that are not finite")
    return np.ascontiguousarray(keys_N), vectors_ND
