"""One rank's partition of a snapshot: how it is opened, and what is asked of it beside features.

Letters of shapes as in featurestore/lookup/hashedrows.py.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt

from featurestore.errors import StorageError
from featurestore.keys import AnyArray, BoolArray, Int64Array, owned_shards, shard_of, shard_of_hash, splitmix64
from featurestore.lookup.cache import default_cache_dir, open_or_build
from featurestore.lookup.hashedrows import HashedRows
from featurestore.problems import Problem
from featurestore.published.versions import VersionName
from featurestore.spec import MissingPolicy
from featurestore.storage.storage import Progress
from featurestore.store import FeatureStore

_MAX_THREADS = 4


class FeaturePartition(HashedRows):
    """The rows of the shards that one rank owns. Lookups may run in several threads at once."""

    _is_hidden = False  # see `hide`

    @classmethod
    def load(
        cls,
        store_or_url: FeatureStore | str | os.PathLike[str],
        rank: int = 0,
        num_ranks: int = 1,
        cache_dir: str | os.PathLike[str] | None = None,
        missing: MissingPolicy = "error",
        threads: int | None = None,
        version: VersionName | None = None,
        progress: Progress | None = None,
    ) -> "FeaturePartition":
        """Open the shards of `rank`, of the newest snapshot or of `version`; missing local files are built.

        `version` is a number, or the name of a channel, which is looked up once.

        `threads` build and look up; by default up to 4 build, and half of the cores but no more than 4 look up: copying
        rows is bound by memory, and other ranks want theirs. A build holds 256 MB of data files, or the largest one,
        and each thread a few blocks and the keys of a shard. Removes files unused for a while from the folder
        (`featurestore.lookup.cache`). Raises as opening a store does, and CorruptFileError for a damaged data file.
        """
        if not 0 <= rank < num_ranks:
            raise ValueError(Problem.RANK_TOO_HIGH.of(rank, num_ranks))
        if missing not in get_args(MissingPolicy):
            raise ValueError(Problem.UNKNOWN_POLICY.of(missing, ", ".join(get_args(MissingPolicy))))
        store = store_or_url if isinstance(store_or_url, FeatureStore) else FeatureStore.open(store_or_url)
        snapshot = store.snapshot(version)
        folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
        cores = len(os.sched_getaffinity(0))
        build_threads = threads or min(_MAX_THREADS, cores)
        owner = f"rank {rank} of {num_ranks}"
        held = owned_shards(store.info.num_shards, rank, num_ranks)
        cached = open_or_build([snapshot.shard_reader(shard) for shard in held], folder, build_threads, progress)
        try:
            return cls(snapshot, held, cached, missing, threads or max(1, min(_MAX_THREADS, cores // 2)), owner)
        except OSError as error:
            raise StorageError(Problem.CANNOT_MAP_CACHE, folder, error) from error

    def __enter__(self) -> "FeaturePartition":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def owns(self, keys_U: npt.ArrayLike) -> BoolArray:
        """Return which keys belong to the shards of this rank, whether they have a feature or not, (U,)."""
        return self._owned_S[shard_of(keys_U, self.info.num_shards)]

    def contains(self, keys_U: npt.ArrayLike) -> BoolArray:
        """Return which keys have a feature among the rows of this rank, (U,); none is read, and hidden ones count."""
        found_U = self.owns(keys_U)
        if self.num_rows == 0:
            return np.zeros_like(found_U)
        hash_O = splitmix64(keys_U)[found_U]  # for other shards' the index walks to its end
        place_O = self._index.places(hash_O, shard_of_hash(hash_O, self.info.num_shards))
        found_U[found_U] = self._index.hash_M[place_O] == hash_O
        return found_U

    def hide(self, hidden: bool) -> None:
        """Hide the features of all images from lookups, or show them again.

        What is a score worth without images? Needs the policy zeros or learned; ValueError.
        """
        if hidden and self.missing_policy == "error":
            raise ValueError(Problem.CANNOT_HIDE_IMAGES.of())
        self._is_hidden = hidden

    def rows(self, block_rows: int) -> Iterator[AnyArray]:
        """Yield all rows held, as they are stored, in the order of `places`; up to `block_rows` at a time."""
        for first, end in self._files.spans:
            for start in range(first, end, block_rows):
                yield self._files.matrix[start : min(end, start + block_rows)]

    def find(self, keys_U: npt.ArrayLike) -> Int64Array:
        """Return the result of `places`, for a caller that looks the rows up itself.

        Keys without a feature are counted, or raise MissingKeysError, as in `lookup`."""
        place_U, missing_U, _ = self._noted(keys_U)
        return np.where(missing_U, -1, place_U)

    def places(self, keys_U: npt.ArrayLike) -> Int64Array:
        """Return a number of its own for each key, in [0, num_rows), (U,); -1 for a key without a feature.

        The same for as long as the partition is open. A key of another rank's shard raises MissingKeysError.
        """
        place_U, missing_U, _ = self._find(keys_U)
        return np.where(missing_U, -1, place_U)

    def _find(self, keys_U: npt.ArrayLike) -> tuple[Int64Array, BoolArray, Int64Array]:
        """Find the keys; all are missing while they are hidden."""
        place_U, missing_U, shard_U = super()._find(keys_U)
        return place_U, missing_U | self._is_hidden, shard_U
