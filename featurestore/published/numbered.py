"""Numbered files of a folder, each made by one exclusive create for ever: the one with the highest number counts."""

from collections.abc import Callable
from typing import TypeVar

from featurestore.errors import CommitConflictError
from featurestore.log import manifest_path, versions
from featurestore.spec import Sealed, seal
from featurestore.storage.storage import Storage

_MAX_ATTEMPTS = 300
SealedT = TypeVar("SealedT", bound=Sealed)


def append_numbered(
    storage: Storage, folder: str, model_of: Callable[[int], SealedT], after: int | None = None
) -> SealedT:
    """Create the next file of a folder; where another writer was first, the one after it.

    `model_of` makes what the file of a number holds, which must be like no other's. `after`: the number that was the
    highest when the caller looked, 0 for none; where it is another by now, nothing is written. Raises
    CommitConflictError then, and after hundreds of lost races; StorageError: then nobody knows whether it was created.
    """
    for _ in range(_MAX_ATTEMPTS):
        highest = max(versions(storage, folder), default=0)
        if after is not None and highest != after:
            raise CommitConflictError(
                f"another writer was first: {storage.full(folder)} has number {highest} by now, and not {after}; look"
                " again, and retry"
            )
        mine = model_of(highest + 1)
        data = seal(mine)  # like no other's; read back, a NaN in it would be null
        if storage.create_or_read(manifest_path(highest + 1, folder), data) == data:
            return mine
    raise CommitConflictError(f"other writers were first {_MAX_ATTEMPTS} times in a row at {storage.url}: run it again")
