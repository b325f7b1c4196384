"""What is known to be damaged: manifests that a repair took out of the log, and notes of data files that only older
snapshots still name.

Such a file cannot come back but from a backup. `verify` tells of it without alarm, until its snapshots expire.
"""

import hashlib

from pydantic import BaseModel, ConfigDict

from featurestore import log
from featurestore.errors import CorruptFileError
from featurestore.spec import FORMAT_VERSION, seal, unseal
from featurestore.storage import Storage

DAMAGED = "damaged"
_PREFIX = "note-"


class DamageNote(BaseModel):
    """One file that a repair found damaged, and could not mend where it stands."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    path: str
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


def put_aside(storage: Storage, path: str) -> None:
    """Move a small damaged file to `damaged/`, under its path with dashes. It may be gone already."""
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        return
    storage.write_bytes(f"{DAMAGED}/{path.replace('/', '-')}", data)
    storage.delete_files([path])


def is_manifest(path: str) -> bool:
    """Whether a file of `damaged/` was put aside from log/ or expired/."""
    folder, _, name = path.removeprefix(f"{DAMAGED}/").partition("-")
    return folder in (log.LOG, log.EXPIRED) and log.version_of(name) is not None
