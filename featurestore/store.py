"""A store: its published states, what a commit does, and how it is opened and written.

A snapshot holds its manifest, so later commits never change what it reads. Its identity is kept by all that is made of
its rows, and compared with a store before they are used.
"""

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from featurestore import errors, log, spec, staging
from featurestore.format import datafile
from featurestore.format.codec import Basis, Codec, FeatureStatistics, Moments, basis_of
from featurestore.format.shard import ShardReader, live_batches, live_schema, newest_rows, take_rows, write_shard_file
from featurestore.keys import AnyArray, BoolArray, FloatArray, Int64Array, shard_of
from featurestore.problems import Problem
from featurestore.published.versions import VersionName, find_channel
from featurestore.spec import FileEntry, Manifest, SourceSnapshot, StoreInfo
from featurestore.storage.safety import refuse_unsafe
from featurestore.storage.storage import Storage, cached_property, in_threads
from featurestore.text import Shown

INFO_PATH = "store.json"
VECTORS_OF = "visual_vectors"  # in the metadata of exported vectors (Parquet): the snapshot of their features, as JSON
_THREADS = 4
_SHOWN = 8  # digits of an id in a message
ResultT = TypeVar("ResultT")
Shards = Mapping[int, Sequence[FileEntry]]  # files of each shard, oldest first


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
            raise missing_keys(missing, f"{where} of {self.storage.url}", what)
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
        """Stream the table of `to_arrow`, a few megabytes at a time."""
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


def missing_keys(keys: Sequence[object] | Int64Array, where: str, what: str = "key") -> errors.MissingKeysError:
    """Return the error for missing keys, or names of images: up to five of them, and how many there are."""
    shown = ", ".join(str(key) for key in keys[:5]) + (", …" if len(keys) > 5 else "")
    have = f"{what} has" if len(keys) == 1 else f"{what}s have"
    return errors.MissingKeysError(Problem.NO_FEATURE, len(keys), have, where, shown)


class SnapshotId(BaseModel):
    """Store and commit of a snapshot, by random ids: a store that was made again has others, also at the same place."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    url: str
    version: int
    store_id: spec.RandomId
    commit_id: spec.OptionalId  # empty of an empty store, which has no commit

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
            raise errors.AnotherStoreError(Problem.ANOTHER_STORE, what, self.described(), found.described(), way_out)


@dataclass(kw_only=True)
class Commit:
    """New files of some shards: behind the files that are there, or in the place of those that it `replaces`.

    Replaced files must all be there still, side by side. Unless only deltas take their place, they must be the oldest
    of their shard: no older file may hold a row that they delete. What others added behind them stays.
    """

    storage: Storage
    info: StoreInfo
    operation: str
    entries: Shards = field(default_factory=dict)
    replaces: Shards = field(default_factory=dict)
    only_after: int | None = None  # the one version that it may follow; None: any
    num_quarantined: int = 0
    mirrors: SourceSnapshot | None = None  # None: what the rows mirrored before
    commit_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self._manifest = cache(lambda version: log.find(self.storage, version) or log.EMPTY)
        self._compared: dict[int, tuple[FileEntry, ...]] = {}  # files that a shard's entries agree with, after a race

    def publish(self) -> Snapshot:
        """Commit, all files or none. Raises CommitConflictError, KeyCollisionError, StorageError."""
        return Snapshot(self.storage, self.info, log.append(self.storage, self))

    def check_files(self) -> None:
        """Raise CorruptFileError, InvalidRowsError or SpecMismatchError where a new file differs from its entry."""
        for shard, entry in ((shard, entry) for shard, entries in self.entries.items() for entry in entries):
            if not 0 <= shard < self.info.num_shards or not entry.path.startswith(f"data/{shard:04d}/"):
                raise errors.InvalidRowsError(Problem.FILE_OF_ANOTHER_SHARD, entry.path, shard, self.info.num_shards)
            try:
                size_bytes = self.storage.size(entry.path)
            except FileNotFoundError as error:
                raise errors.CorruptFileError(Problem.EXPIRED_MEANWHILE, self.storage.full(entry.path)) from error
            if entry.info_digest != self.info.digest or size_bytes != entry.bytes:
                with datafile.open_entry(self.storage, self.info, entry):
                    pass  # names what differs

    def onto(self, parent: Manifest) -> Shards:
        """Return the files of each shard after this commit on `parent`.

        Raises CommitConflictError where another writer has replaced a file of this commit, KeyCollisionError where one
        has given a key another uri.
        """
        if self.only_after is not None and parent.version != self.only_after:
            raise errors.CommitConflictError(Problem.ANOTHER_NEWEST, self.storage.url, parent.version, self.only_after)
        self._check_uris(parent)
        changed = {
            shard: _files_after(parent.files(shard), self.entries.get(shard, ()), self.replaces.get(shard, ()))
            for shard in {*self.entries, *self.replaces}
        }
        return {**parent.shards, **changed}

    def manifest_after(self, parent: Manifest) -> Manifest:
        """Return the manifest that this commit makes of `parent`. Raises the errors of `onto`."""
        shards = {shard: tuple(files) for shard, files in sorted(self.onto(parent).items()) if files}
        files = [file for each in shards.values() for file in each]
        return Manifest(
            version=parent.version + 1,
            parent=parent.commit_id or None,
            commit_id=self.commit_id,
            writer=log.writer_name(),
            time_s=max(time.time(), parent.time_s),  # never backwards, whatever the clocks of the writers say
            operation=self.operation,
            num_quarantined=self.num_quarantined,
            num_files=len(files),
            file_rows=sum(file.rows for file in files),
            file_bytes=sum(file.bytes for file in files),
            shards=shards,
            mirrors=self.mirrors or parent.mirrors,
        )

    def _check_uris(self, parent: Manifest) -> None:
        """Compare new files with those that other writers have added since they were built, or since the last race."""
        for shard, entry in ((shard, entry) for shard, entries in self.entries.items() for entry in entries):
            if self.replaces.get(shard) or entry.based_on == parent.version:
                continue
            files = parent.files(shard)
            known = self._compared[shard] if shard in self._compared else self._manifest(entry.based_on).files(shard)
            added = files[len(known) :] if files[: len(known)] == known else files  # all, where some were replaced
            if added:
                with datafile.open_entry(self.storage, self.info, entry) as file:
                    keys_N, uris = live_uris(file.read([datafile.KEY, datafile.URI, datafile.DELETED]))
                ShardReader(self.storage, self.info, shard, added).check_uris(keys_N, uris)
            self._compared[shard] = files


def live_uris(table: pa.Table) -> tuple[Int64Array, list[str]]:
    """Return key and uri of each row that is not a tombstone."""
    live = table.select([datafile.KEY, datafile.URI]).filter(pa.array(~datafile.numpy_column(table, datafile.DELETED)))
    return datafile.numpy_column(live, datafile.KEY), datafile.text_column(live, datafile.URI)


def _files_after(
    older: Sequence[FileEntry], new: Sequence[FileEntry], replaced: Sequence[FileEntry]
) -> Sequence[FileEntry]:
    paths, gone = [file.path for file in older], [file.path for file in replaced]
    start = paths.index(gone[0]) if gone and gone[0] in paths else len(paths)
    may_be_behind = not gone or (new and all(file.kind == "delta" for file in new))
    if paths[start : start + len(gone)] != gone or not (start == 0 or may_be_behind):
        raise errors.CommitConflictError(Problem.REPLACED_MEANWHILE, ", ".join(gone))
    files = [*older[:start], *new, *older[start + len(gone) :]]
    return [file.model_copy(update={"kind": "delta" if place else "base"}) for place, file in enumerate(files)]


class FeatureStore:
    """Features of images by key, in immutable files under one address; each commit makes a new snapshot.

    Any number of processes may read and write at once. Pickles as its address and `info`.
    """

    def __init__(self, storage: Storage, info: StoreInfo) -> None:
        self.storage = storage
        self.info = info

    @property
    def url(self) -> str:
        """The store's address."""
        return self.storage.url

    @property
    def codec(self) -> Codec:
        """The codec between stored features and float32."""
        return Codec(self.info.dtype)

    @cached_property
    def basis(self) -> Basis | None:
        """Return the basis of a compact store's rows, or None for other stores. Raises CorruptFileError."""
        return basis_of(self.info, self.storage)

    def project(self, values_ND: FloatArray) -> FloatArray:
        """Convert full rows (N, full_dim) to the store's form: unchanged, or their coordinates if it is compact.

        Numbers, not encoded yet. Raises InvalidRowsError for another width.
        """
        return values_ND if self.basis is None else self.basis.project(values_ND)

    @classmethod
    def create(cls, url: str | os.PathLike[str], info: StoreInfo) -> "FeatureStore":
        """Make an empty store, with an id of its own, where a short check finds the place fit for one.

        Raises StoreExistsError, UnsafeBackendError.
        """
        storage = Storage(url, keep_inside=True)
        if INFO_PATH in storage.list():
            raise errors.StoreExistsError(Problem.STORE_EXISTS, storage.url)
        refuse_unsafe(storage)
        mine = info.model_copy(update={"store_id": uuid.uuid4().hex})
        if spec.create_sealed(storage, INFO_PATH, mine).store_id != mine.store_id:
            raise errors.StoreExistsError(Problem.STORE_EXISTS, storage.url)
        return cls(storage, mine)

    @classmethod
    def open(cls, url: str | os.PathLike[str]) -> "FeatureStore":
        """Open a store. Raises StoreNotFoundError, FormatVersionError, CorruptFileError."""
        storage = Storage(url, keep_inside=True)
        try:
            return cls(storage, spec.read_sealed(storage, INFO_PATH, StoreInfo))
        except FileNotFoundError:
            storage.check_bucket()
            raise errors.StoreNotFoundError(Problem.NO_STORE, storage.url, INFO_PATH) from None

    @classmethod
    def open_or_create(cls, url: str | os.PathLike[str], info: StoreInfo) -> "FeatureStore":
        """Open the store, made first where none is there. Raises SpecMismatchError where it differs from `info`."""
        try:
            store = cls.open(url)
        except errors.StoreNotFoundError:
            with contextlib.suppress(errors.StoreExistsError):  # another was first: the check below decides
                return cls.create(url, info)
            store = cls.open(url)
        info.check_same(store.info, f"the store at {store.url}")
        return store

    def snapshot(self, version: VersionName | None = None) -> Snapshot:
        """Open the newest snapshot, that of `version`, or that of a channel.

        One or two small files are read, one more for a channel. Raises SnapshotNotFoundError, also where it expired;
        ChannelError, which names the channels that there are; AnotherStoreError where the channel's snapshot is another
        commit by now.
        """
        if isinstance(version, str):
            return self._of_channel(version)
        if version is not None and version < 0:
            raise errors.SnapshotNotFoundError(Problem.NEGATIVE_VERSION, version)
        return Snapshot(self.storage, self.info, log.read_manifest(self.storage, version))

    def _of_channel(self, name: str) -> Snapshot:
        move = find_channel(self.storage, name)
        assert move.version is not None, "a channel that is found points to a snapshot"
        try:
            manifest = log.read_manifest(self.storage, move.version)
        except errors.SnapshotNotFoundError:  # the channel was moved, and its snapshot removed, during the lookup
            move = find_channel(self.storage, name)
            manifest = log.read_manifest(self.storage, move.version)
        if manifest.commit_id != move.commit_id:
            moved, found = move.commit_id[:8], manifest.commit_id[:8]
            raise errors.AnotherStoreError(Problem.ANOTHER_COMMIT, name, self.url, move.version, moved, found)
        return Snapshot(self.storage, self.info, manifest)

    def stage_part(self, run_id: str, part: str, rows: datafile.FeatureRows) -> None:
        """Keep `rows` as one part of a run, until shards are built.

        All of them or none; the same part again replaces it. Features may be float32, in a store of any dtype.
        """
        staging.stage_part(self.storage, self.info, run_id, part, self.codec.encode_rows(rows))

    def staged_parts(self, run_id: str) -> list[str]:
        """List the names of the run's complete parts, sorted."""
        return staging.staged_parts(self.storage, run_id)

    def discard_staging(self, run_id: str) -> None:
        """Remove the run's parts."""
        staging.discard(self.storage, run_id)

    def build_shards(
        self, run_id: str, shards: range, parts: Sequence[str], kind: spec.FileKind = "delta"
    ) -> dict[int, FileEntry]:
        """Build a data file of each of some neighbouring shards, of its rows in `parts`.

        Of one key's rows that of the last part stays; a shard of which the parts have no row gets no file.
        The files are invisible until a commit names them; the commit decides again whether each is base or delta. Rows
        of all these shards are in memory together; each part is opened once. Raises KeyCollisionError, against the
        store's rows too.
        """
        tables = staging.read_shards_of_parts(self.storage, self.info, run_id, parts, shards)
        snapshot = self.snapshot()
        return {shard: self._build(shard, table, snapshot, kind) for shard, table in tables.items()}

    def put(self, rows: datafile.FeatureRows, operation: str = "put") -> Snapshot:
        """Add or replace rows; one commit. Features may be float32, in a store of any dtype.

        Raises InvalidRowsError, KeyCollisionError.
        """
        return self.commit(self.write(rows), operation)

    def delete(self, keys: Sequence[int] | Int64Array, operation: str = "delete") -> Snapshot:
        """Remove keys, by tombstones; unknown keys are not an error."""
        return self.commit(self.write(datafile.FeatureRows.tombstones(keys, self.info)), operation)

    def write(self, rows: datafile.FeatureRows) -> dict[int, FileEntry]:
        """Write rows, tombstones among them too, as a new file for each shard; invisible until a commit names them.

        Features may be float32, in a store of any dtype. Raises InvalidRowsError, KeyCollisionError.
        """
        table = staging.sorted_table(self.codec.encode_rows(rows), self.info)
        tables, snapshot = staging.cut(table, self.info), self.snapshot()
        built = in_threads(lambda shard: self._build(shard, tables[shard], snapshot, "delta"), tables, _THREADS)
        return dict(zip(tables, built, strict=True))

    def commit(
        self,
        entries: Mapping[int, FileEntry],
        operation: str,
        *,
        num_quarantined: int = 0,
        replaces: Shards | None = None,
        only_after: int | None = None,
        mirrors: SourceSnapshot | None = None,
    ) -> Snapshot:
        """Publish built files, at most one for each shard, as the next snapshot; all of them or none.

        Rebases onto commits of other writers; only a key that they gave another uri refuses it (KeyCollisionError).
        Where `replaces` names files of a shard, the new file takes their place, or they go where there is none: it
        holds rows of those alone. `Commit` says when that is a CommitConflictError; with `only_after` it is one where
        the newest snapshot is another. `mirrors`: the snapshot of another store that the rows are made of from now on.
        """
        commit = Commit(
            storage=self.storage,
            info=self.info,
            operation=operation,
            entries={shard: [entry] for shard, entry in entries.items()},
            replaces=replaces or {},
            num_quarantined=num_quarantined,
            only_after=only_after,
            mirrors=mirrors,
        )
        commit.check_files()
        return commit.publish()

    def add_quarantine(self, rows: Iterable[staging.QuarantineRow]) -> None:
        """Keep images that have no feature, with the reason."""
        staging.add(self.storage, list(rows))

    def quarantine_rows(self) -> list[staging.QuarantineRow]:
        """Read the newest row of each key in quarantine, by time."""
        return staging.read(self.storage)

    def resolve_quarantine(self, rows: Sequence[staging.QuarantineRow]) -> None:
        """Take `rows` out of quarantine: their images are good now, or are none any more."""
        staging.resolve(self.storage, rows)

    def _build(self, shard: int, table: pa.Table, snapshot: Snapshot, kind: spec.FileKind) -> FileEntry:
        keys_N, uris = live_uris(table)
        datafile.check_collisions(keys_N, uris)
        snapshot.shard_reader(shard).check_uris(keys_N, uris)
        newest = take_rows(table, newest_rows(datafile.numpy_column(table, datafile.KEY)))
        return write_shard_file(self.storage, self.info, shard, [newest], kind, snapshot.version)
