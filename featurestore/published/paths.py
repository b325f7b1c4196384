"""Paths of runs: folders and files of this machine, or addresses of an object store, used alike.

An address has plain files, each replaced as a whole, and folders called `checkpoints`, which are published: their
content (`step-N`, and the files in it) is that of one version, see `featurestore.published`.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from featurestore.console.files import json_text, replace_file
from featurestore.storage.local import open_regular, read_regular
from featurestore.storage.remote import check_address

if TYPE_CHECKING:
    from featurestore.storage.storage import Storage

_ADDRESS = re.compile(r"(?!file:)([A-Za-z][A-Za-z0-9+.-]*):/{1,2}([^/].*)")  # pathlib makes one slash of two
DAMAGED = "damaged-"
"""Before the name of a checkpoint: a run has found it damaged and keeps it; no reader takes it for a checkpoint."""
_PUBLISHED = re.compile(rf"(.*/checkpoints)(?:/((?:{DAMAGED})?step-\d+(?:/.+)?))?")


@dataclass(frozen=True, order=True)
class FarPath:
    """A path on an object store, with those methods of `Path` that runs need. Raises StorageError.

    `files`: the version that a path below a published folder is read from; None: the newest. Paths below have the same.
    """

    url: str
    files: "Storage | None" = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "FarPath":
        return FarPath(f"{self.url}/{name}", self.files)

    @property
    def name(self) -> str:
        """Return what follows the last slash."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "FarPath":
        """Return the path without its last part; out of a published folder, it has no version any more."""
        above = self.url.rpartition("/")[0]
        return FarPath(above, self.files if _PUBLISHED.fullmatch(above) else None)

    def absolute(self) -> "FarPath":
        """Return the path: an address is always absolute."""
        return self

    def resolve(self) -> "FarPath":
        """Return the path: an address has no links."""
        return self

    def pinned(self) -> "FarPath":
        """Return the path with the version of its published folder that is the newest now."""
        match = _PUBLISHED.fullmatch(self.url)
        return FarPath(self.url, _open(match[1])) if match and self.files is None else self

    def is_file(self) -> bool:
        """Return whether there is a file of this name."""
        storage, name = self._place()
        try:
            return bool(storage.size(name) + 1)
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        """Return whether something lies below the path."""
        storage, name = self._place()
        return bool(storage.list(name))

    def iterdir(self) -> "list[FarPath]":
        """List what lies directly below the path, sorted."""
        storage, name = self._place()
        return [FarPath(f"{self.url}/{each}", self.files) for each in storage.list(name)]

    def read_bytes(self) -> bytes:
        """Read the whole file. Raises FileNotFoundError where there is none."""
        storage, name = self._place()
        return storage.read_bytes(name)

    def open_input(self) -> IO[bytes]:
        """Open the file for reading, seekable. Raises FileNotFoundError where there is none."""
        storage, name = self._place()
        return storage.open_input(name)

    def write_bytes(self, content: bytes) -> None:
        """Create or replace a plain file as a whole."""
        self._plain().write_bytes(self.name, content)

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Do nothing: an object store has no folders."""

    def unlink(self, missing_ok: bool = True) -> None:
        """Remove a plain file; nothing happens where there is none."""
        self._plain().delete_files([self.name])

    def remove_all(self) -> None:
        """Remove all plain files below the path."""
        self._plain().delete(self.name)

    def _plain(self) -> "Storage":
        from featurestore.storage.storage import Storage

        return Storage(self.parent.url)

    def _place(self) -> "tuple[Storage, str]":
        """Return where the path is read from, and its name there."""
        match = _PUBLISHED.fullmatch(self.url)
        if match is None:
            return self._plain(), self.name
        return self.files or _open(match[1]), match[2] or ""


RunPath = Path | FarPath


def _open(address: str) -> "Storage":
    """Open the newest version; loaded late, as --help of commands needs no client of an object store."""
    from featurestore.published.versions import open_published

    return open_published(address)


def run_path(place: str | os.PathLike[str] | FarPath) -> RunPath:
    """Make the path of a folder, or of an address such as s3://bucket/runs.

    Raises AddressError where the address has no bucket.
    """
    if isinstance(place, FarPath):
        return place
    text = os.fspath(place)
    check_address(text)
    match = _ADDRESS.fullmatch(text)
    return FarPath(f"{match[1]}://{match[2].rstrip('/')}") if match else Path(text.removeprefix("file://"))


def read_file(path: RunPath) -> bytes:
    """Read a regular file. Raises OSError, StorageError."""
    return path.read_bytes() if isinstance(path, FarPath) else read_regular(path)


def read_text(path: RunPath) -> str:
    """Read the text of a file in UTF-8, each line's end as \\n. Raises OSError, StorageError, UnicodeDecodeError."""
    return read_file(path).decode().replace("\r\n", "\n").replace("\r", "\n")


def open_file(path: RunPath) -> IO[bytes]:
    """Open a regular file for reading, seekable. Raises OSError, StorageError."""
    return path.open_input() if isinstance(path, FarPath) else open_regular(path)


def check_bucket(path: RunPath) -> None:
    """Raise BucketNotFoundError where the path is in a bucket that is not there. One request, on a disk none.

    Raises StorageError."""
    from featurestore.storage.storage import Storage

    Storage(str(path.parent)).check_bucket()


def remove_all(path: RunPath) -> None:
    """Remove a folder, or all plain files below an address; nothing happens where there is none."""
    if isinstance(path, FarPath):
        path.remove_all()
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def written_locally(folder: RunPath) -> Iterator[Path]:
    """Give a folder of this machine to write files to: this one, or one whose files are put at the address at the end.

    The end is that of the block. Raises OSError, StorageError."""
    if not isinstance(folder, FarPath):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
        for file in sorted(each for each in Path(name).rglob("*") if each.is_file()):
            (folder / str(file.relative_to(name))).write_bytes(file.read_bytes())


def write_file(path: RunPath, content: str | bytes) -> None:
    """Create or replace a file: readers find all of the old or of the new content. Raises OSError, StorageError."""
    if isinstance(path, FarPath):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    else:
        replace_file(path, content)


def write_json_file(path: RunPath, values: Any) -> None:
    """Write `values` as JSON by `write_file`; numbers that are not finite become null."""
    write_file(path, json_text(values))
