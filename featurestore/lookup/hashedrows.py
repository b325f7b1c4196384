"""Rows of a snapshot in mapped files, found by the hashes of their keys.

Letters of shapes: M rows or hashes held, U keys or hashes asked, C of them in a block, D feature width.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featurestore.errors import FeatureStoreError, MissingKeysError
from featurestore.keys import AnyArray, BoolArray, HashIndex, Int64Array, shard_of_hash, splitmix64
from featurestore.lookup.cache import CachedShard
from featurestore.lookup.rowfiles import RowFiles, output_for
from featurestore.problems import Problem
from featurestore.spec import MissingPolicy, StoreInfo
from featurestore.store import Snapshot, SnapshotId, missing_keys


@dataclass(frozen=True)
class Lookup:
    """Features in the order asked, (U, D) in numpy's dtype of the store, and which keys have none, (U,) bool."""

    features_UD: AnyArray
    missing_U: BoolArray


class HashedRows:
    """The rows of some shards. Lookups may run in several threads at once."""

    def __init__(
        self,
        snapshot: Snapshot,
        shards: Sequence[int],
        cached: Sequence[CachedShard],
        missing: MissingPolicy,
        threads: int,
        owner: str,
    ) -> None:
        """`shards` are those held, ascending, `cached` their files; `owner` is for messages."""
        self.info: StoreInfo = snapshot.info
        self.codec = snapshot.codec
        self.snapshot_version = snapshot.version
        self.snapshot_id = SnapshotId.of(snapshot)
        self.missing_policy = missing
        self.missing_count = 0
        self._owner = owner
        self._owned_S = np.zeros(self.info.num_shards, np.bool_)
        self._owned_S[list(shards)] = True
        self._owns_all = bool(self._owned_S.all())
        self._where = f"snapshot {snapshot.version} of {snapshot.storage.url}"
        self._lock = threading.Lock()
        self._closed = False
        counts = [len(shard.hash_M) for shard in cached]
        self._index = HashIndex(shards, [shard.hash_M for shard in cached], self.info.num_shards)
        paths = [shard.rows_path for shard in cached]
        self._files = RowFiles(paths, counts, self.dim, self.info.storage_dtype, threads)
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64) if counts else np.empty(0, np.int64)
        self._gap_S = np.zeros(self.info.num_shards, np.int64)  # from the place of a hash to the row in the files
        self._gap_S[list(shards)] = np.asarray(self._files.first_rows) - starts

    @property
    def dim(self) -> int:
        """Width of a feature."""
        return self.info.dim

    @property
    def num_rows(self) -> int:
        """Rows held."""
        return len(self._index)

    def close(self) -> None:
        """End the threads and close the files."""
        self._closed = True
        self._files.close()

    def lookup(self, keys_U: npt.ArrayLike, out: AnyArray | None = None) -> Lookup:
        """Return the features of `keys_U` in the order asked.

        Written into `out` (U, D) where it is given: faster, as new memory costs as much as the rows. A key without a
        feature: the policy `error` raises MissingKeysError; `zeros` and `learned` give a row of zeros and a mask, and
        add to `missing_count`. A key of a shard that this rank does not own raises MissingKeysError.
        """
        row_U, missing_U = self._rows_of(keys_U)
        features_UD = output_for(self.info, len(row_U), out)
        self._gather(row_U, missing_U, features_UD)
        return Lookup(features_UD, missing_U)

    def lookup_blocks(self, keys_U: npt.ArrayLike, block_rows: int) -> Iterator[Lookup]:
        """Look up `block_rows` keys at a time, in memory that the next block uses again.

        For a caller that makes something else of the rows while they are in the processor's cache. What it raises comes
        before the first block.
        """
        row_U, missing_U = self._rows_of(keys_U)
        memory = output_for(self.info, min(block_rows, len(row_U)), None)
        for start in range(0, len(row_U), block_rows):
            block = slice(start, start + block_rows)
            features_CD = memory[: len(row_U[block])]
            self._gather(row_U[block], missing_U[block], features_CD)
            yield Lookup(features_CD, missing_U[block])

    def _find(self, keys_U: npt.ArrayLike) -> tuple[Int64Array, BoolArray, Int64Array]:
        """Return the place of each key among the hashes held, whether there is none, and its shard, (U,) each."""
        hash_U = splitmix64(keys_U)
        shard_U = shard_of_hash(hash_U, self.info.num_shards)
        if not self._owns_all and (strange_U := ~self._owned_S[shard_U]).any():
            key, shard = np.asarray(keys_U).reshape(-1)[strange_U][0], shard_U[strange_U][0]
            raise MissingKeysError(Problem.SHARD_NOT_OWNED, int(strange_U.sum()), self._owner, key, shard)
        if self.num_rows == 0:
            return np.zeros(len(hash_U), np.int64), np.ones(len(hash_U), np.bool_), shard_U
        place_U = self._index.places(hash_U, shard_U)
        return place_U, self._index.hash_M.take(place_U) != hash_U, shard_U

    def _rows_of(self, keys_U: npt.ArrayLike) -> tuple[Int64Array, BoolArray]:
        """Return each key's row in the files, and whether there is none, (U,) each; counts or raises the missing."""
        place_U, missing_U, shard_U = self._noted(keys_U)
        return place_U + self._gap_S[shard_U], missing_U

    def _noted(self, keys_U: npt.ArrayLike) -> tuple[Int64Array, BoolArray, Int64Array]:
        """Do what `_find` does; count or raise the missing."""
        if self._closed:
            raise FeatureStoreError(Problem.PARTITION_CLOSED)
        found = self._find(keys_U)
        if found[1].any():
            self._note_missing(np.asarray(keys_U), found[1])
        return found

    def _gather(self, row_U: Int64Array, missing_U: BoolArray, out_UD: AnyArray) -> None:
        if not missing_U.all():
            self._files.take(np.where(missing_U, 0, row_U), out_UD)  # any row will do where there is none
        out_UD[missing_U] = 0

    def _note_missing(self, keys_U: Int64Array, missing_U: BoolArray) -> None:
        if self.missing_policy == "error":
            raise missing_keys(keys_U.reshape(-1)[missing_U], self._where)
        with self._lock:
            self.missing_count += int(missing_U.sum())
