"""What counts as damage, and what is known to be damaged: manifests put aside, notes of files that cannot be mended

Manifests are those that a repair took out of the log; notes are of data files that only older snapshots still name.
Such a file cannot come back but from a backup. `verify` tells of it without alarm, until its snapshots expire.
"""

import errno
import hashlib

from pydantic import BaseModel, ConfigDict

from featurestore import log
from featurestore.errors import CorruptFileError, StorageError
from featurestore.spec import FORMAT_VERSION, StorePath, seal, unseal
from featurestore.storage.storage import Storage

DAMAGED = "damaged"
_PREFIX = "note-"


def is_damage(storage: Storage, error: Exception) -> bool:
    """Whether an error says that one file is not what was written, or that a sector of a local disk cannot be read.

    Else the file may be whole: the storage is away or refuses, or it was written by a newer program.
    """
    if isinstance(error, StorageError) and storage.is_local:
        return isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EIO
    return isinstance(error, CorruptFileError)


class DamageNote(BaseModel):
    """One file that a repair found damaged, and could not mend where it stands."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    path: StorePath
    reason: str
    time_s: float


def note(storage: Storage, path: str, reason: str) -> None:
    """Remember that a file is damaged; again is no error."""
    name = hashlib.sha256(path.encode()).hexdigest()[:32]
    storage.write_bytes(
        f"{DAMAGED}/{_PREFIX}{name}.json", seal(DamageNote(path=path, reason=reason, time_s=storage.now()))
    )


def noted_paths(storage: Storage) -> set[str]:
    """The files that notes name. A note that is damaged itself counts for nothing: its file is reported again."""
    found = set()
    for name in storage.list(DAMAGED):
        if name.startswith(_PREFIX):
            path = f"{DAMAGED}/{name}"
            try:
                found.add(unseal(storage.read_bytes(path), DamageNote, storage.full(path)).path)
            except (CorruptFileError, FileNotFoundError):
                continue
    return found


def keep_copy(storage: Storage, path: str) -> None:
    """Copy a small damaged file to `damaged/`, under its path with dashes; an empty one where it cannot be read, or is
    a link out of the store. It may be gone already."""
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        return
    except (CorruptFileError, StorageError) as error:
        if not is_damage(storage, error):
            raise
        data = b""
    storage.write_bytes(f"{DAMAGED}/{path.replace('/', '-')}", data)


def put_aside(storage: Storage, path: str) -> None:
    """Move a small damaged file to `damaged/`, as `keep_copy` does."""
    keep_copy(storage, path)
    storage.delete_files([path])


def is_manifest(path: str) -> bool:
    """Whether a file of `damaged/` was put aside from log/ or expired/."""
    folder, _, name = path.removeprefix(f"{DAMAGED}/").partition("-")
    return folder in (log.LOG, log.EXPIRED) and log.version_of(name) is not None
