"""Files of a folder: written beside and renamed or linked into place, on the disk when the call returns."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

TEMPORARY = ".tmp-"  # how names of files begin that are not complete


class StorageEntry(NamedTuple):
    """One file of a listing."""

    path: str  # relative to the storage
    size_bytes: int
    mtime_s: float  # by the storage's own clock, as `Storage.now`; whole seconds on S3
    tag: str = ""  # another one when the file was written again; empty where the storage has none


class DiskFiles:
    """Files below a folder of this machine; errors are Python's own."""

    def __init__(self, root: str) -> None:
        self._root = root

    def path(self, path: str) -> Path:
        """Where `path` stands on this machine."""
        return Path(self._root, path) if path else Path(self._root)

    def read_bytes(self, path: str) -> bytes:
        """The whole file."""
        return self.path(path).read_bytes()

    def read_into(self, path: str, out: memoryview) -> int:
        """The beginning of the file; its size."""
        with self.path(path).open("rb", buffering=0) as file:
            filled = 0
            while filled < len(out) and (count := file.readinto(out[filled:])):
                filled += count
            return os.fstat(file.fileno()).st_size

    def open_input(self, path: str) -> IO[bytes]:
        """The file for reading."""
        return self.path(path).open("rb")

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Link a complete file to its name: False where the name is taken."""
        with self._temporary(path) as (target, temporary):
            with temporary.open("xb") as file:
                file.write(data)
                _to_disk(file)
            try:
                target.hardlink_to(temporary)
            except FileExistsError:
                return False
            _sync_folder(target.parent)
            return True

    @contextlib.contextmanager
    def open_output(self, path: str) -> Iterator[IO[bytes]]:
        """A file that gets its name when the block ends."""
        with self._temporary(path) as (target, temporary):
            with temporary.open("xb") as file:
                yield file
                _to_disk(file)
            temporary.replace(target)
            _sync_folder(target.parent)

    def list(self, path: str) -> list[str]:
        """Names in a folder."""
        return os.listdir(self.path(path))  # noqa: PTH208 - names alone are wanted

    def entry(self, path: str) -> StorageEntry:
        """Size and time of one file."""
        return _entry(path, self.path(path).stat())

    def entries(self, path: str, recursive: bool) -> Iterator[StorageEntry]:
        """Files of a folder and of the folders in it; a folder or file that vanishes meanwhile is left out."""
        try:
            found = [*os.scandir(self.path(path))]
        except (FileNotFoundError, NotADirectoryError):
            return
        for each in found:
            relative = f"{path}/{each.name}" if path else each.name
            if each.is_dir(follow_symlinks=False):
                if recursive:
                    yield from self.entries(relative, recursive)
                continue
            with contextlib.suppress(FileNotFoundError):
                yield _entry(relative, each.stat())

    def delete(self, path: str) -> None:
        """Remove a file, or a folder with all below it."""
        place = self.path(path)
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)

    def delete_files(self, paths: Iterable[str]) -> None:
        """Remove files."""
        for path in paths:
            self.path(path).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _temporary(self, path: str) -> Iterator[tuple[Path, Path]]:
        """The place of a file, its folder made, and a name beside it; a file of this name is removed at the end."""
        target = self.path(path)
        _make_folder(target.parent)
        temporary = target.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            yield target, temporary
        finally:
            temporary.unlink(missing_ok=True)


def _entry(path: str, stat: os.stat_result) -> StorageEntry:
    # The times alone are not enough: mtime can be set, as rsync does, and a rename keeps both.
    tag = f"{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}"
    return StorageEntry(path, stat.st_size, stat.st_mtime, tag)


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, each on the disk before a file in it is."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
