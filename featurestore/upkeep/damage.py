"""Damage: how one file is checked, and how damaged ones are noted and set aside.

In `damaged/` are manifests that a repair took out of the log, and notes of data files that only older snapshots still
name. Such a file cannot come back but from a backup: `verify` reports it without alarm until its snapshots expire.

Letters of shapes: N rows of a file, M live rows of several files.
"""

import contextlib
import hashlib
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featurestore import log
from featurestore.errors import CorruptFileError, StorageError
from featurestore.format.datafile import (
    DELETED,
    KEY,
    URI,
    DataFile,
    FileMemory,
    info_in,
    matrix_of,
    numpy_column,
    open_entry,
    read_verified,
    schema_of,
    text_column,
)
from featurestore.format.rows import finite_rows
from featurestore.keys import Int64Array, keys_of_uris, shard_of_hash, splitmix64
from featurestore.spec import (
    MAX_VERSION,
    FileEntry,
    Manifest,
    Sealed,
    StoreInfo,
    StorePath,
    create_sealed,
    read_sealed,
    seal,
)
from featurestore.storage.storage import Storage
from featurestore.store import INFO_PATH
from featurestore.upkeep import DATA

DAMAGED = "damaged"
_PREFIX = "note-"
_MOST_BETWEEN_PINS = 1 << 32  # commits; more than a century of one each second


class DamageNote(Sealed):
    """One file that a repair found damaged, and could not mend where it is."""

    path: StorePath
    reason: str
    time_s: float


def note(storage: Storage, path: str, reason: str) -> None:
    """Remember that a data file is damaged; to note it again is no error."""
    name = hashlib.sha256(path.encode()).hexdigest()[:32]
    storage.write_bytes(
        f"{DAMAGED}/{_PREFIX}{name}.json", seal(DamageNote(path=path, reason=reason, time_s=storage.now()))
    )


def noted_paths(storage: Storage) -> set[str]:
    """Return the files that notes name. A note that is damaged itself does not count: its file is reported again."""
    found = set()
    for name in storage.list(DAMAGED):
        if name.startswith(_PREFIX):
            with contextlib.suppress(FileNotFoundError, CorruptFileError):
                found.add(read_sealed(storage, f"{DAMAGED}/{name}", DamageNote).path)
    return found


def keep_copy(storage: Storage, path: str) -> None:
    """Copy a small damaged file to `damaged/`, under its path with dashes.

    The copy is empty where the file cannot be read, or is a link out of the store. The file may be gone already."""
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        return
    except CorruptFileError:
        data = b""
    storage.write_bytes(f"{DAMAGED}/{path.replace('/', '-')}", data)


def put_aside(storage: Storage, path: str) -> None:
    """Move a small damaged file to `damaged/`, as `keep_copy` does."""
    keep_copy(storage, path)
    storage.delete_files([path])


def is_manifest(path: str) -> bool:
    """Return whether a file of `damaged/` was put aside from log/ or expired/."""
    folder, _, name = path.removeprefix(f"{DAMAGED}/").partition("-")
    return folder in (log.LOG, log.EXPIRED) and log.version_of(name) is not None


def rebuild_info(url: str, dry_run: bool) -> str:
    """Write store.json from the copy in a data file of the newest good manifest; return the path of that file.

    A damaged one is kept in damaged/. The store keeps its `store_id`; where its data files are too old to know it, it
    gets a new one. Raises CorruptFileError where no file is good.
    """
    storage = Storage(url, keep_inside=True)
    found = _info_of_a_file(storage, newest_good(storage, folders=(log.LOG, log.EXPIRED)))
    if found is None:
        raise CorruptFileError(
            f"{storage.full(INFO_PATH)} cannot be rebuilt, as no data file of the newest snapshot is good: put it back"
            " from a backup"
        )
    path, info = found
    if not dry_run:
        keep_copy(storage, INFO_PATH)
        store_id = info.store_id or uuid.uuid4().hex
        storage.write_bytes(INFO_PATH, seal(info.model_copy(update={"store_id": store_id})))
    return path


def newest_good(storage: Storage, bad: Collection[int] = (), folders: Sequence[str] = (log.LOG,)) -> Manifest:
    """Read the newest manifest that is whole and none of the `bad` versions, from the first folder that has one.

    Raises CorruptFileError where none has.
    """
    for folder in folders:
        for version in reversed(log.versions(storage, folder)):
            if version not in bad:
                with contextlib.suppress(FileNotFoundError, CorruptFileError):
                    return log.read(storage, version, folder)
    raise CorruptFileError(
        f"no manifest of {storage.url} is good, and none in {log.EXPIRED}/ has all of its files:"
        f" put {storage.full(log.LOG)} back from a backup"
    )


def recoverable(storage: Storage, damaged: Collection[int]) -> list[Manifest]:
    """Read the manifests in expired/ that can take the place of damaged ones of the log, ascending.

    These are copies of the damaged ones themselves, and where the newest is damaged all that are newer than the newest
    good one. Each must be whole, and name only data files that exist.
    """
    good = max((version for version in log.versions(storage) if version not in damaged), default=0)
    newest = max(damaged, default=0)
    wanted = [v for v in log.versions(storage, log.EXPIRED) if v in damaged or good < v < newest]
    names = {entry.path for entry in storage.entries(DATA)} if wanted else set()
    found = []
    for version in wanted:
        with contextlib.suppress(FileNotFoundError, CorruptFileError):
            manifest = log.read(storage, version, log.EXPIRED)
            if all(entry.path in names for entry in manifest.entries):
                found.append(manifest)
    return found


def put_back(storage: Storage, manifest: Manifest) -> None:
    """Move a manifest from expired/ to log/, where a damaged one of its version makes room for it."""
    path = log.manifest_path(manifest.version)
    keep_copy(storage, path)
    storage.write_bytes(path, seal(manifest))
    storage.delete_files([log.manifest_path(manifest.version, log.EXPIRED)])  # second: a kill loses none


def recommit(storage: Storage, good: Manifest, version: int, operation: str, dry_run: bool) -> None:
    """Commit the newest good manifest again as `version`, the number behind that of the newest, which is damaged.

    Readers and writers stop at a damaged newest manifest, and continue with this one. Where another repair was first,
    its commit stays.
    """
    if not dry_run:
        again = good.model_copy(
            update={
                "version": version,
                "parent": good.commit_id,
                "commit_id": uuid.uuid4().hex,
                "writer": log.writer_name(),
                "time_s": max(time.time(), good.time_s),
                "operation": operation,
            }
        )
        create_sealed(storage, log.manifest_path(version), again)


def was_committed(storage: Storage, good: Manifest, version: int) -> bool:
    """Return whether a damaged newest manifest was once a commit, as far as can be known: then its number is used up.

    It was where every number between the newest good manifest and it is in log/, expired/ or damaged/. Else there is a
    gap, and a stray file. But expiry may have made the gap: behind the newest good one only where a pin or a channel
    keeps that, so where there are some, and no more numbers in between than commits can be, the gap proves nothing.
    """
    aside = [name.partition("-")[2] for name in storage.list(DAMAGED) if is_manifest(name)]
    known = {*log.versions(storage), *log.versions(storage, log.EXPIRED), *map(log.version_of, aside)}
    num_between = version - good.version - 1
    if len([number for number in known if number and good.version < number < version]) == num_between:
        return version < MAX_VERSION
    return log.has_kept_by_name(storage) and num_between < min(_MOST_BETWEEN_PINS, MAX_VERSION - version)


def _info_of_a_file(storage: Storage, manifest: Manifest) -> tuple[str, StoreInfo] | None:
    for entry in manifest.entries:
        with contextlib.suppress(FileNotFoundError, CorruptFileError):
            info = info_in(read_verified(storage, entry.path, "sha256", entry.sha256), storage.full(entry.path))
            if info.digest == entry.info_digest:
                return entry.path, info
    return None


@dataclass(frozen=True)
class FileKeys:
    """What is compared of each row of a file: key, xxh3-64 of its uri, whether it is a tombstone, all (N,)."""

    keys_N: Int64Array
    uri_hash_N: Int64Array
    deleted_N: npt.NDArray[np.bool_]


def check_file(
    storage: Storage, info: StoreInfo, shard: int, entry: FileEntry, memory: FileMemory
) -> tuple[list[str], FileKeys | None]:
    """List what is wrong with a data file, and return its keys, none where it cannot be read.

    Size, sha256, page checksums, columns, row counts, order, duplicates, membership, values. Reads the whole file once;
    needs its size, from `memory`, and a block. Raises StorageError, except for a broken sector of a local disk.
    """
    path = storage.full(entry.path)
    if entry.info_digest != info.digest:
        return [f"{path} belongs to a store of another kind: its info_digest is not that of store.json"], None
    blocks, num_infinite = [], 0
    try:
        with open_entry(storage, info, entry, "sha256", memory) as file:
            for block in file.blocks(schema_of(info).names):
                num_infinite += int(np.count_nonzero(~finite_rows(matrix_of(block, info), info.dtype)))
                blocks.append(_keys_of(block))
    except CorruptFileError as error:
        return [str(error)], None
    keys = _joined(blocks)
    found = list(_broken_promises(keys, info, shard, entry))
    if num_infinite:
        found.append(f"holds {num_infinite} features that are not finite")
    return [f"{path} {promise}" for promise in found], keys


def collisions(files: Sequence[FileKeys]) -> Int64Array:
    """Return keys that get another uri while they live, in files of one shard, oldest first; deleted keys are free."""
    keys_M, uri_M = np.empty(0, np.int64), np.empty(0, np.int64)  # live rows, by key
    broken = []
    for file in files:
        is_live_N = ~file.deleted_N
        new_M, place_M = np.unique(file.keys_N[is_live_N], return_index=True)
        new_uri_M = file.uri_hash_N[is_live_N][place_M]
        common, mine, theirs = np.intersect1d(keys_M, new_M, assume_unique=True, return_indices=True)
        broken.append(common[uri_M[mine] != new_uri_M[theirs]])
        stays_M = ~np.isin(keys_M, file.keys_N)
        keys_M, uri_M = np.append(keys_M[stays_M], new_M), np.append(uri_M[stays_M], new_uri_M)
    return np.unique(np.concatenate([np.empty(0, np.int64), *broken]))


def readable_keys(storage: Storage, info: StoreInfo, shard: int, entry: FileEntry) -> tuple[FileKeys, list[str]]:
    """Read the keys that can still be read of a damaged file, and uris (empty where those cannot).

    Row groups whose pages do not fit their checksums are left out. Nothing at all where the file is gone, its footer is
    broken, or it is another file than the one that was committed: of another size, other rows, or with keys of other
    shards."""
    found, uris = [], []
    try:
        if storage.size(entry.path) != entry.bytes:
            return _joined([]), []
        with storage.open_input(entry.path) as source:
            file = DataFile(source, info, storage.full(entry.path))
            if file.num_rows != entry.rows:
                return _joined([]), []
            for group in range(len(file.group_starts) - 1):
                table = _readable_group(file, group)
                if table is not None:
                    found.append(_keys_of(table))
                    uris += text_column(table, URI)
    except (CorruptFileError, StorageError, FileNotFoundError):
        pass  # what was read before is good
    keys = _joined(found)
    if (shard_of_hash(splitmix64(keys.keys_N), info.num_shards) != shard).any():
        return _joined([]), []
    return keys, uris


def _joined(parts: Sequence[FileKeys]) -> FileKeys:
    return FileKeys(
        np.concatenate([np.empty(0, np.int64), *(each.keys_N for each in parts)]),
        np.concatenate([np.empty(0, np.int64), *(each.uri_hash_N for each in parts)]),
        np.concatenate([np.empty(0, np.bool_), *(each.deleted_N for each in parts)]),
    )


def _readable_group(file: DataFile, group: int) -> pa.Table | None:
    try:
        table = file.read([KEY], [group])
    except CorruptFileError:
        return None
    columns: dict[str, Any] = {
        URI: pa.array([""] * len(table), pa.string()),
        DELETED: pa.array(np.zeros(len(table), np.bool_)),
    }
    for name in columns:
        try:
            columns[name] = file.read([name], [group])[name]
        except CorruptFileError:
            continue
    columns[KEY] = table[KEY]
    return pa.table(columns)


def _keys_of(table: pa.Table) -> FileKeys:
    keys_N, deleted_N = numpy_column(table, KEY), numpy_column(table, DELETED)
    return FileKeys(keys_N.copy(), keys_of_uris(text_column(table, URI)), deleted_N.copy())


def _broken_promises(keys: FileKeys, info: StoreInfo, shard: int, entry: FileEntry) -> Iterator[str]:
    hash_N = splitmix64(keys.keys_N)
    if len(np.unique(hash_N)) != len(hash_N):
        yield "holds a key twice"
    elif (hash_N[1:] < hash_N[:-1]).any():
        yield "is not in the order of splitmix64"
    strays = int((shard_of_hash(hash_N, info.num_shards) != shard).sum())
    if strays:
        yield f"holds {strays} keys that do not belong to shard {shard}"
    num_deleted = int(np.count_nonzero(keys.deleted_N))
    if num_deleted != entry.num_deleted:
        yield f"has {num_deleted} tombstones instead of {entry.num_deleted}"
