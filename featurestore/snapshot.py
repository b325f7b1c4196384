"""One published state of a store, and its identity.

A snapshot holds its manifest, so later commits never change what it reads. Its identity is kept by all that is made of
its rows, and compared with a store before they are used.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from featurestore import log
from featurestore.errors import AnotherStoreError, MissingKeysError
from featurestore.format.codec import Codec
from featurestore.format.shard import ShardReader, live_batches, live_schema
from featurestore.format.statistics import FeatureStatistics, Moments
from featurestore.keys import AnyArray, BoolArray, Int64Array, shard_of
from featurestore.spec import Manifest, OptionalId, RandomId, SourceSnapshot, StoreInfo
from featurestore.storage.storage import Storage, cached_property, in_threads
from featurestore.text import Shown

VECTORS_OF = "visual_vectors"  # in the metadata of exported vectors (Parquet): the snapshot of their features, as JSON
_SHOWN = 8  # digits of an id in a message
_THREADS = 4
ResultT = TypeVar("ResultT")


class Snapshot(Shown):
    """The rows of a store as of one commit. Letters of shapes: M live rows, U keys asked, D feature width."""

    def __init__(self, storage: Storage, info: StoreInfo, manifest: Manifest) -> None:
        self.storage = storage
        self.info = info
        self.manifest = manifest

    @property
    def version(self) -> int:
        """Number of the commit; 0 is the empty store."""
        return self.manifest.version

    @property
    def codec(self) -> Codec:
        """The codec between stored features and float32."""
        return Codec(self.info.dtype)

    @cached_property
    def num_rows(self) -> int:
        """Live rows. Reads the keys of shards that have delta files."""
        return sum(self._each_shard(lambda reader: reader.num_rows))

    def _about(self) -> tuple[str, dict[str, Any]]:
        values = {"version": self.version, "file_rows": self.manifest.file_rows, "operation": self.manifest.operation}
        return self.storage.url, {**values, "dim": self.info.dim, "dtype": self.info.dtype}

    def shard_reader(self, shard: int) -> ShardReader:
        """Return the merged view of one shard."""
        return ShardReader(self.storage, self.info, shard, self.manifest.files(shard))

    def keys(self) -> Int64Array:
        """Read the keys of all live rows, ascending (M,)."""
        return np.sort(np.concatenate([np.empty(0, np.int64), *self._each_shard(lambda reader: reader.keys())]))

    def contains(self, keys: Sequence[int] | Int64Array) -> BoolArray:
        """Return which of the keys have a feature, (U,); reads the keys of their shards, one shard at a time."""
        keys_U = np.asarray(keys, dtype=np.int64)
        shard_U = shard_of(keys_U, self.info.num_shards)
        found_U = np.zeros(len(keys_U), np.bool_)
        for shard in np.unique(shard_U).tolist():
            here_U = shard_U == shard
            found_U[here_U] = np.isin(keys_U[here_U], self.shard_reader(shard).keys())
        return found_U

    def find(self, keys: Sequence[int] | Int64Array) -> tuple[AnyArray, BoolArray]:
        """Read features in the order asked, (U, D), and which of the keys have one (U,); the others get zeros.

        Features are as they are stored: `codec.decode` makes them float32. For a few keys; `FeaturePartition` is made
        for many.
        """
        keys_U = np.asarray(keys, dtype=np.int64)
        shard_U = shard_of(keys_U, self.info.num_shards)
        features_UD = np.zeros((len(keys_U), self.info.dim), self.info.storage_dtype)
        found_U = np.zeros(len(keys_U), np.bool_)
        for shard in np.unique(shard_U):
            here_U = shard_U == shard
            features_UD[here_U], found_U[here_U] = self.shard_reader(int(shard)).features(keys_U[here_U])
        return features_UD, found_U

    def get(self, keys: Sequence[int] | Int64Array, images: Sequence[object] | None = None) -> AnyArray:
        """Read features of keys that all have one, as `find` does. Raises MissingKeysError.

        `images`: names of the images, which the error then has in place of keys."""
        features_UD, found_U = self.find(np.asarray(keys, dtype=np.int64))
        if not found_U.all():
            asked_U, what = (keys, "key") if images is None else (images, "image")
            missing, where = [asked_U[place] for place in np.flatnonzero(~found_U).tolist()], f"snapshot {self.version}"
            raise MissingKeysError(missing_message(missing, f"{where} of {self.storage.url}", what))
        return features_UD

    def to_arrow(self, columns: Sequence[str] | None = None, decode: bool = True) -> pa.Table:
        """Read all live rows, or columns of them, as one table.

        The columns are key, uri, content_digest, source_tag, width, height, feature. `decode` makes the features
        fixed-size lists of float32; else they are bytes as stored. The newest row of each key is there, tombstones are
        not; shard by shard. Raises ValueError for an unknown column, CorruptFileError.
        """
        schema = live_schema(self.info, columns, decode)
        codec = self.codec
        batches = self._each_shard(lambda reader: list(live_batches(reader, codec, columns, decode)))
        return pa.Table.from_batches([batch for shard in batches for batch in shard], schema)

    def arrow_reader(self, columns: Sequence[str] | None = None, decode: bool = True) -> pa.RecordBatchReader:
        """Stream what `to_arrow` reads, a few megabytes at a time."""
        schema, readers = live_schema(self.info, columns, decode), map(self.shard_reader, sorted(self.manifest.shards))
        batches = (batch for reader in readers for batch in live_batches(reader, self.codec, columns, decode))
        return pa.RecordBatchReader.from_batches(schema, batches)

    def statistics(self) -> FeatureStatistics:
        """Compute mean and standard deviation of each dimension over the live rows.

        From the files' own statistics; small files, and shards with delta files, are read.
        """
        moments = Moments.empty(self.info.dim)
        for part in self._each_shard(lambda reader: reader.moments()):
            moments = moments.merged(part)
        return moments.statistics()

    def _each_shard(self, work: Callable[[ShardReader], ResultT]) -> list[ResultT]:
        """Do `work` on every shard that has files, in the order of shards."""
        readers = [self.shard_reader(shard) for shard in sorted(self.manifest.shards)]
        return list(in_threads(work, readers, _THREADS))


def missing_message(keys: Sequence[object] | Int64Array, where: str, what: str = "key") -> str:
    """Format up to five of the missing keys, or names of images, and how many there are."""
    shown = ", ".join(str(key) for key in keys[:5])
    have = f"{what} has" if len(keys) == 1 else f"{what}s have"
    return f"{len(keys)} {have} no feature in {where}: {shown}{', …' if len(keys) > 5 else ''}"


class SnapshotId(BaseModel):
    """Store and commit of a snapshot, by random ids: a store that was made again has others, also at the same place."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    url: str
    version: int
    store_id: RandomId
    commit_id: OptionalId  # empty of an empty store, which has no commit

    @classmethod
    def of(cls, snapshot: Snapshot) -> "SnapshotId":
        """Return the id of an open snapshot."""
        return cls(
            url=snapshot.storage.url,
            version=snapshot.version,
            store_id=snapshot.info.store_id,
            commit_id=snapshot.manifest.commit_id,
        )

    @classmethod
    def of_source(cls, source: SourceSnapshot) -> "SnapshotId":
        """Return the id of the snapshot that another store's rows are made of."""
        return cls(**source.model_dump())

    def as_source(self) -> SourceSnapshot:
        """Return the record of this snapshot for a store whose rows are computed from it."""
        return SourceSnapshot(**self.model_dump())

    def named(self) -> dict[str, Any]:
        """Return the fields of a report: store, snapshot, store_id, commit_id."""
        return {"store": self.url, "snapshot": self.version, "store_id": self.store_id, "commit_id": self.commit_id}

    def described(self) -> str:
        """Format for a message: `snapshot 3 (commit 0a1b2c3d) of store 4e5f6a7b at URL`."""
        commit = self.commit_id[:_SHOWN] or "none"
        return f"snapshot {self.version} (commit {commit}) of store {self.store_id[:_SHOWN]} at {self.url}"

    def is_same(self, found: "SnapshotId") -> bool:
        """Return whether `found` is this snapshot or another one of its store.

        Equal numbers must be one commit. Other numbers must be of one store: of one id, or, where store.json was made
        again, with this commit in the log of `found`. Reads a small file for the latter; raises FeatureStoreError.
        """
        if self.commit_id and self.version == found.version:
            return self.commit_id == found.commit_id
        if self.store_id == found.store_id:
            return True
        kept = log.find(Storage(found.url), self.version)
        return kept is not None and kept.commit_id == self.commit_id

    def check(self, found: "SnapshotId", what: str, way_out: str) -> None:
        """Raise AnotherStoreError where `found` is of another store.

        `what` (a checkpoint, an index) has rows of this one. A store that was copied, restored, compacted or repaired
        is the same."""
        if not self.is_same(found):
            raise AnotherStoreError(
                f"{what} belongs to {self.described()}. This is {found.described()}: another store of the same kind, "
                f"whose features may differ; {way_out}"
            )
