"""The store: open, write, commit."""

import contextlib
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featurestore import log, staging
from featurestore.commit import Commit, Shards, live_uris
from featurestore.errors import AnotherStoreError, SnapshotNotFoundError, StoreExistsError, StoreNotFoundError
from featurestore.format.codec import Basis, Codec, basis_of
from featurestore.format.datafile import KEY, numpy_column
from featurestore.format.rows import FeatureRows, check_collisions
from featurestore.format.shard import newest_rows, take_rows, write_shard_file
from featurestore.keys import Int64Array
from featurestore.published.versions import VersionName, find_channel
from featurestore.snapshot import Snapshot
from featurestore.spec import FileEntry, FileKind, SourceSnapshot, StoreInfo, create_sealed, read_sealed
from featurestore.storage.safety import refuse_unsafe
from featurestore.storage.storage import Storage, cached_property, in_threads

INFO_PATH = "store.json"
_THREADS = 4


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

    def project(self, values_ND: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
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
            raise StoreExistsError(f"{storage.url} is a store already")
        refuse_unsafe(storage)
        mine = info.model_copy(update={"store_id": uuid.uuid4().hex})
        if create_sealed(storage, INFO_PATH, mine).store_id != mine.store_id:
            raise StoreExistsError(f"{storage.url} is a store already")
        return cls(storage, mine)

    @classmethod
    def open(cls, url: str | os.PathLike[str]) -> "FeatureStore":
        """Open a store. Raises StoreNotFoundError, FormatVersionError, CorruptFileError."""
        storage = Storage(url, keep_inside=True)
        try:
            return cls(storage, read_sealed(storage, INFO_PATH, StoreInfo))
        except FileNotFoundError:
            storage.check_bucket()
            raise StoreNotFoundError(f"no store at {storage.url}: {INFO_PATH} is not there") from None

    @classmethod
    def open_or_create(cls, url: str | os.PathLike[str], info: StoreInfo) -> "FeatureStore":
        """Open the store, made first where none is there. Raises SpecMismatchError where it differs from `info`."""
        try:
            store = cls.open(url)
        except StoreNotFoundError:
            with contextlib.suppress(StoreExistsError):  # another was first: the check below decides
                return cls.create(url, info)
            store = cls.open(url)
        info.check_same(store.info, f"the store at {store.url}")
        return store

    def snapshot(self, version: VersionName | None = None) -> Snapshot:
        """Open the newest snapshot, that of `version`, or that of a channel.

        One small file is read, two for a channel. Raises SnapshotNotFoundError, also where it has expired;
        ChannelError, which names the channels that there are; AnotherStoreError where the channel's snapshot is another
        commit by now.
        """
        if isinstance(version, str):
            return self._of_channel(version)
        if version is not None and version < 0:
            raise SnapshotNotFoundError(f"{version} is not a version: they count from 0, the empty store")
        return Snapshot(self.storage, self.info, log.read_manifest(self.storage, version))

    def _of_channel(self, name: str) -> Snapshot:
        move = find_channel(self.storage, name)
        assert move.version is not None, "a channel that is found points to a snapshot"
        try:
            manifest = log.read_manifest(self.storage, move.version)
        except SnapshotNotFoundError:  # the channel was moved, and its snapshot removed, during the lookup
            move = find_channel(self.storage, name)
            manifest = log.read_manifest(self.storage, move.version)
        if manifest.commit_id != move.commit_id:
            raise AnotherStoreError(
                f"channel {name} of {self.url} points to snapshot {move.version} of commit {move.commit_id[:8]}, and"
                f" snapshot {move.version} is commit {manifest.commit_id[:8]} here: the store was put back from a"
                f" backup, or made again; set the channel again: crossmedia store channel {self.url} {name} N"
            )
        return Snapshot(self.storage, self.info, manifest)

    def stage_part(self, run_id: str, part: str, rows: FeatureRows) -> None:
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
        self, run_id: str, shards: range, parts: Sequence[str], kind: FileKind = "delta"
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

    def put(self, rows: FeatureRows, operation: str = "put") -> Snapshot:
        """Add or replace rows; one commit. Features may be float32, in a store of any dtype.

        Raises InvalidRowsError, KeyCollisionError.
        """
        return self.commit(self.write(rows), operation)

    def delete(self, keys: Sequence[int] | Int64Array, operation: str = "delete") -> Snapshot:
        """Remove keys, by tombstones; unknown keys are not an error."""
        return self.commit(self.write(FeatureRows.tombstones(keys, self.info)), operation)

    def write(self, rows: FeatureRows) -> dict[int, FileEntry]:
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

    def _build(self, shard: int, table: pa.Table, snapshot: Snapshot, kind: FileKind) -> FileEntry:
        keys_N, uris = live_uris(table)
        check_collisions(keys_N, uris)
        snapshot.shard_reader(shard).check_uris(keys_N, uris)
        newest = take_rows(table, newest_rows(numpy_column(table, KEY)))
        return write_shard_file(self.storage, self.info, shard, [newest], kind, snapshot.version)
