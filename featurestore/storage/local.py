"""Storage on a local disk: regular files, private folders, exclusive creates.

What is in a cache is taken for what this user's own runs wrote. That holds where the folder is theirs, and nobody else
may write into it; and of each file where it is theirs, and nobody else may write to it.
"""

import contextlib
import errno
import io
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from featurestore.errors import CorruptFileError, StorageError
from featurestore.problems import Problem

TEMPORARY = ".tmp-"  # how names of files begin that are not complete


class StorageEntry(NamedTuple):
    """One file of a listing."""

    path: str  # relative to the storage
    size_bytes: int
    mtime_s: float  # by the storage's own clock, as `Storage.now`; whole seconds on S3
    tag: str = ""  # another one when the file was written again; empty where the storage has none


class DiskFiles:
    """Files below a folder of this machine, behind `Storage`, which documents the methods; errors are Python's own.

    With `keep_inside` no symbolic link leads out of the folder: what lies behind one is neither read nor written, but
    CorruptFileError is raised. Nothing is removed behind one in any case. The folder itself may be a link. Costs one
    lstat for each part of a path.
    """

    def __init__(self, root: str, keep_inside: bool = False) -> None:
        self._root = root
        self._keep_inside = keep_inside

    def path(self, path: str, follow: bool = True, removing: bool = False) -> Path:
        """Return where `path` is on this machine.

        Without `follow` it may itself be a link that leads anywhere: to be replaced or removed, which leaves alone what
        is behind it. `removing`: the links above it are checked also without `keep_inside`. Raises CorruptFileError."""
        place = Path(self._root, path) if path else Path(self._root)
        if self._keep_inside or removing:
            parts = path.split("/") if path else []
            self._check_inside(place, parts if follow else parts[:-1])
        return place

    def _check_inside(self, place: Path, parts: list[str]) -> None:
        step = self._root
        for part in parts:
            step = f"{step}/{part}"
            if os.path.islink(step):  # noqa: PTH114 - many times a second; of a Path it costs twice as much
                target = Path(os.path.realpath(step))  # not Path.resolve, which raises for a circle on Python 3.11
                if not target.is_relative_to(os.path.realpath(self._root)) or not target.exists():
                    raise CorruptFileError(Problem.LINK_LEADS_OUT, place, self._root, step, target)

    def read_bytes(self, path: str) -> bytes:
        return read_regular(self.path(path))

    def read_into(self, path: str, out: memoryview) -> int:
        with open_regular(self.path(path)) as file:
            filled = 0
            while filled < len(out) and (count := file.readinto(out[filled:])):
                filled += count
            return os.fstat(file.fileno()).st_size

    def open_input(self, path: str) -> IO[bytes]:
        return open_regular(self.path(path))

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
            sync(target.parent)
            return True

    @contextlib.contextmanager
    def open_output(self, path: str) -> Iterator[IO[bytes]]:
        """Open a file that gets its name when the block ends."""
        with self._temporary(path) as (target, temporary):
            with temporary.open("xb") as file:
                yield file
                _to_disk(file)
            temporary.replace(target)
            sync(target.parent)

    def list(self, path: str) -> list[str]:
        return os.listdir(self.path(path))  # noqa: PTH208 - names alone are wanted

    def entry(self, path: str) -> StorageEntry:
        """Look up size and time of one file, or of a folder. A pipe has no size: IrregularFileError."""
        found = self.path(path).stat()
        if not stat.S_ISDIR(found.st_mode):
            _check_regular(found.st_mode)
        return _entry(path, found)

    def entries(self, path: str, recursive: bool) -> Iterator[StorageEntry]:
        """List the files of a folder and of the folders in it, without those that vanish meanwhile.

        Links to folders are left out: so nobody removes files behind one by this list."""
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
            if each.is_symlink() and Path(each).is_dir():
                continue
            with contextlib.suppress(FileNotFoundError):
                yield _entry(relative, each.stat(follow_symlinks=not self._keep_inside))

    def delete(self, path: str) -> None:
        """Remove a file, or a folder with all below it; of a link the link alone."""
        place = self.path(path, follow=False, removing=True)
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)

    def delete_files(self, paths: Iterable[str]) -> None:
        for path in paths:
            self.path(path, follow=False, removing=True).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _temporary(self, path: str) -> Iterator[tuple[Path, Path]]:
        """Make the folder of a file; give its place and a temporary name, whose file is removed at the end."""
        target = self.path(path, follow=False)
        _make_folder(target.parent)
        temporary = target.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            yield target, temporary
        finally:
            temporary.unlink(missing_ok=True)


def _entry(path: str, found: os.stat_result) -> StorageEntry:
    # The times alone are not enough: mtime can be set, as rsync does, and a rename keeps both.
    tag = f"{found.st_ino}-{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}"
    return StorageEntry(path, found.st_size, found.st_mtime, tag)


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, each on the disk before a file in it is."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class IrregularFileError(OSError):
    """A pipe, a socket or a device in the place of a file."""


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a file for reading, as `open` does; never waits for another process. Raises OSError."""
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - returned; Path has no opener
    try:
        _check_regular(os.fstat(file.fileno()).st_mode)
    except IrregularFileError:
        file.close()
        raise
    return file


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a file. Raises OSError."""
    with open_regular(path) as file:
        return file.read()


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a file in UTF-8, each line's end as \\n. Raises OSError, UnicodeDecodeError."""
    return read_regular(path).decode().replace("\r\n", "\n").replace("\r", "\n")


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise IrregularFileError(errno.EINVAL, Problem.NOT_REGULAR.of())


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # changes nothing for regular files; a pipe opens at once


_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def claim(folder: Path) -> None:
    """Make a folder for this user alone. Raises StorageError where other users could write into one that is there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise StorageError(Problem.CANNOT_USE_CACHE, folder, error) from error
    if found.st_uid != os.geteuid() or found.st_mode & _OTHERS_WRITE:
        raise StorageError(Problem.OTHERS_CAN_WRITE, folder)


def is_private(found: os.stat_result) -> bool:
    """Return whether that is a regular file of this user, which nobody else may write to."""
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & _OTHERS_WRITE


def open_private(path: str, flags: int) -> int:
    """Open, as `opener` of `open`, files that only this user may read and write."""
    return os.open(path, flags, 0o600)
