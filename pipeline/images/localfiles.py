"""Image files on this machine's disks: what a folder has below it, and the bytes of regular files.

Links are followed, but each folder is listed once: links in a circle end, and a folder that several links lead to has
its files under one name. Pipes, sockets and devices are no images: opening one could wait for ever.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import NamedTuple
from urllib.parse import quote_from_bytes

from featurestore.storage import local
from pipeline.errors import BadImageError

NOT_TEXT = "the file's name is not UTF-8 (%XX means a byte of it): rename the file"
_ALL_BUT_PERCENT = "".join(map(chr, range(32, 127))).replace("%", "")


class LocalFile(NamedTuple):
    """A file below a folder. `found` is None where it cannot be looked at; reading it will say why."""

    path: str
    found: os.stat_result | None

    @property
    def is_regular(self) -> bool:
        """Whether it may have the bytes of an image; what cannot be looked at may."""
        return self.found is None or stat.S_ISREG(self.found.st_mode)


def check_reachable(path: str) -> None:
    """Raise PermissionError where this user may not even know what is at a path, which looks like nothing else."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        Path(path).stat()


def files_below(root: str) -> Iterator[LocalFile]:
    """List all files below a folder. A folder that is there as itself and behind links is listed as itself.

    Raises OSError where a folder cannot be listed: its images would be taken for vanished.
    """
    listed: set[tuple[int, int]] = set()
    folders, links = [root], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        found = Path(folder).stat()
        if (found.st_dev, found.st_ino) in listed:
            continue
        listed.add((found.st_dev, found.st_ino))
        with os.scandir(folder) as entries:
            children = sorted(entries, key=lambda entry: entry.name)
        for entry in children:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
                continue
            target = _target_of(entry)
            if target is not None and stat.S_ISDIR(target.st_mode):
                links.append(entry.path)
            else:
                yield LocalFile(entry.path, target)


def read_regular(path: str, most_bytes: int | None = None) -> bytes:
    """Read a regular file, or one that a link leads to, or its first `most_bytes`.

    Raises BadImageError for others, OSError."""
    try:
        with local.open_regular(path) as file:
            return file.read(most_bytes)
    except local.IrregularFileError as error:
        raise BadImageError(str(error)) from error


def is_text(name: str) -> bool:
    """Return whether a name from the disk is UTF-8, so that Parquet and JSON can hold it."""
    return not any("\udc80" <= each <= "\udcff" for each in name)


def spelled(name: str) -> str:
    """Return a name that is no UTF-8 for people: %XX for each byte beyond ASCII, and for %; urllib can undo it."""
    return quote_from_bytes(os.fsencode(name), safe=_ALL_BUT_PERCENT)


def _target_of(entry: "os.DirEntry[str]") -> os.stat_result | None:
    """Look at what a file is, or what its link leads to."""
    try:
        return entry.stat()
    except PermissionError:
        if entry.is_symlink() and not PurePath(entry.name).suffix:  # to a folder, perhaps
            raise
        return None
    except OSError:  # a link that leads nowhere, or in a circle
        return None
