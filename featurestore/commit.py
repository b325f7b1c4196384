"""What a commit makes of the snapshot before it: files added, files replaced, and nothing of other writers lost."""

import os
import platform
import time
import uuid
from collections.abc import Callable, Mapping, Sequence

from featurestore import log
from featurestore.errors import CommitConflictError
from featurestore.snapshot import Snapshot
from featurestore.spec import FileEntry, FileKind, Manifest, StoreInfo
from featurestore.storage.storage import Storage

Shards = Mapping[int, Sequence[FileEntry]]


def publish_shards(
    storage: Storage,
    info: StoreInfo,
    operation: str,
    following: Callable[[Manifest], Shards],
    num_quarantined: int = 0,
) -> Snapshot:
    """Commit the files that `following` gives for the newest manifest; asked again whenever another writer was first.

    Whatever `following` raises ends the commit. Raises StorageError, CommitConflictError.
    """
    commit_id = uuid.uuid4().hex

    def manifest_after(parent: Manifest) -> Manifest:
        shards = {shard: tuple(files) for shard, files in sorted(following(parent).items()) if files}
        files = [file for shard_files in shards.values() for file in shard_files]
        return Manifest(
            version=parent.version + 1,
            parent=parent.commit_id or None,
            commit_id=commit_id,
            writer=writer_name(),
            time_s=max(time.time(), parent.time_s),  # never backwards, whatever the clocks of the writers say
            operation=operation,
            num_quarantined=num_quarantined,
            num_files=len(files),
            file_rows=sum(file.rows for file in files),
            file_bytes=sum(file.bytes for file in files),
            shards=shards,
        )

    return Snapshot(storage, info, log.publish(storage, commit_id, manifest_after))


def writer_name() -> str:
    """Host and process, for people."""
    return f"{platform.node()}:{os.getpid()}"


def files_after(older: Sequence[FileEntry], new: FileEntry | None, replaced: Sequence[FileEntry]) -> list[FileEntry]:
    """A shard's files with `new` behind them, or in the place of `replaced`, which are its neighbours; a base is first.

    Without `new` the replaced files go, which are then the oldest: what they delete must not be older than they are.
    Raises CommitConflictError where they are not there, or not so.
    """
    paths, gone = [file.path for file in older], [file.path for file in replaced]
    start = paths.index(gone[0]) if gone and gone[0] in paths else len(paths)
    may_be_behind = not gone or (new is not None and new.kind == "delta")
    if paths[start : start + len(gone)] != gone or not (start == 0 or may_be_behind):
        raise CommitConflictError(
            f"another writer has replaced or removed {', '.join(gone)} meanwhile: read the newest snapshot and retry"
        )
    if new is None:
        return [*older[:start], *older[start + len(gone) :]]
    kind: FileKind = "delta" if start else "base"
    return [*older[:start], new.model_copy(update={"kind": kind}), *older[start + len(gone) :]]
