"""Paths of runs: folders and files of this machine, or addresses of an object store, used alike.

A run's files are plain ones, each replaced as a whole; its checkpoints are published, see `featurestore.published`.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from featurestore.console.files import json_text, replace_file
from featurestore.storage.local import open_regular, read_regular
from featurestore.storage.remote import check_address

if TYPE_CHECKING:
    from featurestore.storage.storage import Storage

_ADDRESS = re.compile(r"(?!file:)([A-Za-z][A-Za-z0-9+.-]*):/{1,2}([^/].*)")  # pathlib makes one slash of two


@dataclass(frozen=True, order=True)
class RemotePath:
    """A path on an object store, with those methods of `Path` that runs need. Raises StorageError."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """Return the part after the last slash."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        """Return the path without its last part."""
        return RemotePath(self.url.rpartition("/")[0])

    def absolute(self) -> "RemotePath":
        """Return the path: an address is always absolute."""
        return self

    def resolve(self) -> "RemotePath":
        """Return the path: an address has no links."""
        return self

    def is_file(self) -> bool:
        """Return whether there is a file of this name."""
        try:
            return bool(self._storage.size(self.name) + 1)
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        """Return whether something lies below the path."""
        return bool(self._storage.list(self.name))

    def iterdir(self) -> "list[RemotePath]":
        """List the entries directly below the path, sorted."""
        return [RemotePath(f"{self.url}/{each}") for each in self._storage.list(self.name)]

    def read_bytes(self) -> bytes:
        """Read the whole file. Raises FileNotFoundError where there is none."""
        return self._storage.read_bytes(self.name)

    def open_input(self) -> IO[bytes]:
        """Open the file for reading, seekable. Raises FileNotFoundError where there is none."""
        return self._storage.open_input(self.name)

    def write_bytes(self, content: bytes) -> None:
        """Create or replace a file as a whole."""
        self._storage.write_bytes(self.name, content)

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Do nothing: an object store has no folders."""

    def unlink(self, missing_ok: bool = True) -> None:
        """Remove a file; nothing happens where there is none."""
        self._storage.delete_files([self.name])

    def remove_all(self) -> None:
        """Remove all files below the path."""
        self._storage.delete(self.name)

    @property
    def _storage(self) -> "Storage":
        """Return the storage of the path; loaded late, as --help of commands needs no client of an object store."""
        from featurestore.storage.storage import Storage

        return Storage(self.parent.url)


RunPath = Path | RemotePath


def run_path(place: str | os.PathLike[str] | RemotePath) -> RunPath:
    """Make the path of a folder, or of an address such as s3://bucket/runs.

    Raises AddressError where the address has no bucket.
    """
    if isinstance(place, RemotePath):
        return place
    text = os.fspath(place)
    check_address(text)
    match = _ADDRESS.fullmatch(text)
    return RemotePath(f"{match[1]}://{match[2].rstrip('/')}") if match else Path(text.removeprefix("file://"))


def read_file(path: RunPath) -> bytes:
    """Read a regular file. Raises OSError, StorageError."""
    return path.read_bytes() if isinstance(path, RemotePath) else read_regular(path)


def read_text(path: RunPath) -> str:
    """Read the text of a file in UTF-8, each line's end as \\n. Raises OSError, StorageError, UnicodeDecodeError."""
    return read_file(path).decode().replace("\r\n", "\n").replace("\r", "\n")


def open_file(path: RunPath) -> IO[bytes]:
    """Open a regular file for reading, seekable. Raises OSError, StorageError."""
    return path.open_input() if isinstance(path, RemotePath) else open_regular(path)


def check_bucket(path: RunPath) -> None:
    """Raise BucketNotFoundError if the path's bucket does not exist. One request; none on a disk.

    Raises StorageError."""
    from featurestore.storage.storage import Storage

    Storage(str(path.parent)).check_bucket()


def remove_all(path: RunPath) -> None:
    """Remove a folder, or all plain files below an address; nothing happens where there is none."""
    if isinstance(path, RemotePath):
        path.remove_all()
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def written_locally(folder: RunPath) -> Iterator[Path]:
    """Yield a local folder to write to: this one, or a temporary one that is uploaded to the address at the end.

    The end is that of the block. Raises OSError, StorageError."""
    if not isinstance(folder, RemotePath):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
        for file in sorted(each for each in Path(name).rglob("*") if each.is_file()):
            (folder / str(file.relative_to(name))).write_bytes(file.read_bytes())


def write_file(path: RunPath, content: str | bytes) -> None:
    """Create or replace a file: readers find all of the old or of the new content. Raises OSError, StorageError."""
    if isinstance(path, RemotePath):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    else:
        replace_file(path, content)


def write_json_file(path: RunPath, values: Any) -> None:
    """Write `values` as JSON by `write_file`; numbers that are not finite become null."""
    write_file(path, json_text(values))
