"""A commit: files that are added to the newest snapshot of a store, and those that they replace."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import pyarrow as pa

from featurestore import log
from featurestore.errors import CommitConflictError, CorruptFileError, InvalidRowsError
from featurestore.format.datafile import DELETED, KEY, URI, numpy_column, open_entry, text_column
from featurestore.format.shard import ShardReader
from featurestore.keys import Int64Array
from featurestore.snapshot import Snapshot
from featurestore.spec import FileEntry, Manifest, SourceSnapshot, StoreInfo
from featurestore.storage.storage import Storage

Shards = Mapping[int, Sequence[FileEntry]]  # files of each shard, oldest first


@dataclass(kw_only=True)
class Commit:
    """New files of some shards: behind the files that are there, or in the place of those that it `replaces`.

    Replaced files must all be there still, side by side. Unless only deltas take their place, they must be the oldest
    of their shard: what they delete must not be older than they are. What others added behind them stays.
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
        """Raise CorruptFileError, InvalidRowsError or SpecMismatchError where a new file is not what its entry says."""
        for shard, entry in ((shard, entry) for shard, entries in self.entries.items() for entry in entries):
            if not 0 <= shard < self.info.num_shards or not entry.path.startswith(f"data/{shard:04d}/"):
                raise InvalidRowsError(f"{entry.path} is not a file of shard {shard} of {self.info.num_shards}")
            try:
                size_bytes = self.storage.size(entry.path)
            except FileNotFoundError as error:
                raise CorruptFileError(
                    f"{self.storage.full(entry.path)} is missing: `expire` removes files that no snapshot names once"
                    " they are older than its grace time; build it again"
                ) from error
            if entry.info_digest != self.info.digest or size_bytes != entry.bytes:
                with open_entry(self.storage, self.info, entry):
                    pass  # names what differs

    def onto(self, parent: Manifest) -> Shards:
        """Return the files of each shard after this commit on `parent`.

        Raises CommitConflictError where another writer has replaced what this commit is about, KeyCollisionError where
        one has given a key another uri.
        """
        if self.only_after is not None and parent.version != self.only_after:
            raise CommitConflictError(f"{self.storage.url} has snapshot {parent.version}, and not {self.only_after}")
        self._check_uris(parent)
        changed = {
            shard: _files_after(parent.files(shard), self.entries.get(shard, ()), self.replaces.get(shard, ()))
            for shard in {*self.entries, *self.replaces}
        }
        return {**parent.shards, **changed}

    def manifest_after(self, parent: Manifest) -> Manifest:
        """Return the manifest that this commit makes of `parent`. Raises what `onto` raises."""
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
                with open_entry(self.storage, self.info, entry) as file:
                    keys_N, uris = live_uris(file.read([KEY, URI, DELETED]))
                ShardReader(self.storage, self.info, shard, added).check_uris(keys_N, uris)
            self._compared[shard] = files


def live_uris(table: pa.Table) -> tuple[Int64Array, list[str]]:
    """Return key and uri of each row that is not a tombstone."""
    live = table.select([KEY, URI]).filter(pa.array(~numpy_column(table, DELETED)))
    return numpy_column(live, KEY), text_column(live, URI)


def _files_after(
    older: Sequence[FileEntry], new: Sequence[FileEntry], replaced: Sequence[FileEntry]
) -> Sequence[FileEntry]:
    paths, gone = [file.path for file in older], [file.path for file in replaced]
    start = paths.index(gone[0]) if gone and gone[0] in paths else len(paths)
    may_be_behind = not gone or (new and all(file.kind == "delta" for file in new))
    if paths[start : start + len(gone)] != gone or not (start == 0 or may_be_behind):
        raise CommitConflictError(
            f"another writer has replaced or removed {', '.join(gone)} meanwhile: read the newest snapshot and retry"
        )
    files = [*older[:start], *new, *older[start + len(gone) :]]
    return [file.model_copy(update={"kind": "delta" if place else "base"}) for place, file in enumerate(files)]
