"""A folder that belongs to one user: nobody else can put a file into it, or change one.

What is in a cache is taken for what this user's own runs wrote. That holds where the folder is theirs, and nobody else
may write into it; and of each file where it is theirs, and nobody else may write to it.
"""

import contextlib
import os
import pwd
import stat
from collections.abc import Callable
from pathlib import Path

from featurestore.errors import StorageError

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def claim(folder: Path, is_ours: Callable[[str], bool]) -> None:
    """Make a folder for this user alone, or make sure that nobody else can write into it.

    One that others may look into is closed to them where all names in it are `is_ours`; a home, or a place with other
    things in it, stays as it is. Raises StorageError where it is another user's, or others can still write into it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_owner(folder)
        mode = folder.stat().st_mode
        is_shared = mode & stat.S_ISVTX  # as /tmp is
        if mode & _OTHERS and not is_shared and all(map(is_ours, os.listdir(folder))):  # noqa: PTH208 - names alone
            with contextlib.suppress(OSError):  # a disk that may only be read: what is left decides
                folder.chmod(0o700)
            mode = folder.stat().st_mode
    except OSError as error:
        raise StorageError(f"cannot use the cache folder {folder}: {error}") from error
    if mode & _OTHERS_WRITE:
        raise StorageError(
            f"other users can write into the cache folder {folder} (mode {stat.S_IMODE(mode):04o}): they could put any"
            " rows into it. It is not closed to them by itself if it holds other things, is shared as /tmp is, or its"
            f" disk has no permissions. Choose a new folder for data.cache_dir, or chmod 700 {folder}"
        )


def check_owner(folder: Path) -> None:
    """Raise StorageError where a folder is another user's; OSError where it is not there."""
    owner, mine = _owner(folder), os.geteuid()
    if owner != mine:
        raise StorageError(
            f"the cache folder {folder} belongs to {_user(owner)}, and this run is {_user(mine)}'s: rows in it could be"
            " anybody's. Choose another data.cache_dir, as a new folder that this run makes, or give this one to the"
            f" run's user: chown -R {mine} {folder} (in a container, run as the user who owns the mounted folder)"
        )


def is_private(found: os.stat_result) -> bool:
    """Return whether that is a regular file of this user, which nobody else may write to."""
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & _OTHERS_WRITE


def open_private(path: str, flags: int) -> int:
    """Open, as `opener` of `open`, files that only this user may read and write."""
    return os.open(path, flags, 0o600)


def _owner(folder: Path) -> int:
    return folder.stat().st_uid


def _user(uid: int) -> str:
    try:
        return f"user {uid} ({pwd.getpwuid(uid).pw_name})"
    except KeyError:  # in a container, most are only numbers
        return f"user {uid}"
