"""The one door to files: a folder, file://, s3:// and whatever else fsspec opens (memory:// in tests).

Foreign errors are translated here: a missing file is FileNotFoundError, everything else StorageError with its cause.
"""

import contextlib
import io
import os
import threading
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

import fsspec
from fsspec.core import split_protocol
from fsspec.utils import stringify_path

from featurestore.errors import StorageError

_LOST_RACE_CODES = {"PreconditionFailed", "412"}
_TRY_AGAIN_CODES = {"ConditionalRequestConflict", "OperationAborted", "409"}
_CREATE_ATTEMPTS = 10
_memory_lock = threading.Lock()

Names = list[str]  # inside the class, `list` is the method


class StorageEntry(NamedTuple):
    """One file of a listing."""

    path: str  # relative to the storage
    size_bytes: int
    mtime_s: float  # by the storage's own clock, as `Storage.now`; whole seconds on S3


Entries = list[StorageEntry]


class Scratch:
    """Memory of one thread for one file after the other: fresh memory costs the kernel as much as reading the file."""

    def __init__(self) -> None:
        self._memory = bytearray()

    def view(self, size: int) -> memoryview:
        """`size` bytes; what was in them is lost."""
        if len(self._memory) < size:
            self._memory = bytearray(size)  # not resized in place: views of the old may live on
        return memoryview(self._memory)[:size]


class Storage:
    """Files below one address; every path is relative to it, with forward slashes.

    Pickles as its address. The client is made on first use in each process, so never shared across a fork.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        text = stringify_path(url)
        protocol, path = split_protocol(text)
        self._protocol = protocol or "file"
        self._root = str(Path(path).absolute()) if self.is_local else path.rstrip("/")
        self.url = self._root if self.is_local else f"{self._protocol}://{self._root.lstrip('/')}"
        self._client: tuple[int, Any] | None = None

    def __reduce__(self) -> tuple[type["Storage"], tuple[str]]:
        return Storage, (self.url,)

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    @property
    def is_local(self) -> bool:
        """Whether the files are on a disk of this machine, so that they can be linked and mapped."""
        return self._protocol in ("file", "local")

    def join(self, *parts: str) -> str:
        """One relative path from its parts."""
        return "/".join(part.strip("/") for part in parts if part)

    def full(self, path: str) -> str:
        """The address of `path`, for messages and for other tools."""
        return f"{self.url}/{path}" if path else self.url

    def read_scratch(self, path: str, scratch: Scratch) -> memoryview:
        """The whole file, where it is local in `scratch`: valid until that is used again. Raises FileNotFoundError."""
        if not self.is_local:
            return memoryview(self.read_bytes(path))
        with self._translated("read", path), self._local(path).open("rb", buffering=0) as file:
            view = scratch.view(os.fstat(file.fileno()).st_size)
            filled = 0
            while count := file.readinto(view[filled:]):
                filled += count
            return view[:filled]

    def read_bytes(self, path: str) -> bytes:
        """The whole file. Raises FileNotFoundError where there is none."""
        with self._translated("read", path):
            if self.is_local:
                return self._local(path).read_bytes()
            data: bytes = self._fs.cat_file(self._remote(path))
            return data

    def write_bytes(self, path: str, data: bytes) -> None:
        """Create or replace the file; a reader sees the old content or the new, never a part."""
        with self.open_output(path) as file:
            file.write(data)

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Create the file unless it exists: True when made here, False when another was there first.

        An error leaves open whether the file was made (a lost answer), and on an object store the client's own retry
        can report False for its own write: read the file back to know.
        """
        with self._translated("create", path):
            if self.is_local:
                return self._link_exclusive(self._local(path), data)
            return self._put_exclusive(self._remote(path), data)

    def list(self, path: str = "") -> Names:
        """Names (not paths) directly below `path`, sorted; empty where nothing is there. Temporary files are hidden."""
        with self._translated("list", path):
            try:
                names = (
                    os.listdir(self._local(path))  # noqa: PTH208 - names alone are wanted
                    if self.is_local
                    else [entry.rstrip("/").rsplit("/", 1)[-1] for entry in self._listed(path)]
                )
            except FileNotFoundError:
                return []
        return sorted(name for name in names if not name.startswith(".tmp-"))

    def entries(self, path: str = "", recursive: bool = True) -> Entries:
        """The files below `path`, by path; temporary files (`.tmp-…`) included, folders not; empty where nothing is.

        On an object store one flat listing, 1,000 files an answer. A file that vanishes meanwhile is left out.
        """
        with self._translated("list", path):
            return sorted(
                self._local_entries(path, recursive) if self.is_local else self._remote_entries(path, recursive)
            )

    def now(self) -> float:
        """Seconds since 1970 by the clock that stamps the files here: that of the disk or of the object store.

        Writes, looks at and removes a small file. Ages are told by it, as this machine's own clock may differ.
        """
        probe = f".tmp-clock-{uuid.uuid4().hex}"
        self.write_bytes(probe, b"")
        try:
            return self.entry(probe).mtime_s
        finally:
            self.delete(probe)

    def entry(self, path: str) -> StorageEntry:
        """Size and time of one file. Raises FileNotFoundError where there is none."""
        with self._translated("look at", path):
            if self.is_local:
                stat = self._local(path).stat()
                return StorageEntry(path, stat.st_size, stat.st_mtime)
            found = self._fs.info(self._remote(path))
            return StorageEntry(path, int(found["size"]), _time_of(found))

    def size(self, path: str) -> int:
        """Bytes of the file. Raises FileNotFoundError where there is none."""
        with self._translated("look at", path):
            if self.is_local:
                return self._local(path).stat().st_size
            return int(self._fs.size(self._remote(path)))

    def delete(self, path: str) -> None:
        """Remove a file, or a folder with all below it; nothing happens where nothing is there."""
        with self._translated("delete", path), contextlib.suppress(FileNotFoundError):
            self._fs.rm(str(self._local(path)) if self.is_local else self._remote(path), recursive=True)

    def open_input(self, path: str) -> IO[bytes]:
        """The file for reading, seekable. Raises FileNotFoundError where there is none."""
        with self._translated("open", path):
            if self.is_local:
                return self._local(path).open("rb")
            file: IO[bytes] = self._fs.open(self._remote(path), "rb")
            return file

    @contextlib.contextmanager
    def open_output(self, path: str) -> Iterator[IO[bytes]]:
        """A file to write that appears under its name when the block ends, and not at all when the block raises."""
        if self.is_local:
            with self._replacing(self._local(path), path) as file:
                yield file
            return
        # An exception inside s3fs' own open(path, "wb") leaves half an object: the content is put in one piece instead.
        buffer = io.BytesIO()
        yield buffer
        with self._translated("write", path):
            self._fs.pipe_file(self._remote(path), buffer.getvalue())

    @property
    def _fs(self) -> Any:
        if self._client is None or self._client[0] != os.getpid():
            options: dict[str, Any] = {"use_listings_cache": False} if self._protocol in ("s3", "s3a") else {}
            try:
                self._client = os.getpid(), fsspec.filesystem(self._protocol, **options)
            except (ValueError, ImportError) as error:
                raise StorageError(f"{self.url}: {error}") from error
        return self._client[1]

    def _local(self, path: str) -> Path:
        return Path(self._root, path) if path else Path(self._root)

    def _remote(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def _listed(self, path: str) -> Names:
        entries: Names = self._fs.ls(self._remote(path), detail=False)
        return [entry for entry in entries if entry.strip("/") != self._remote(path).strip("/")]

    def _local_entries(self, path: str, recursive: bool) -> Iterator[StorageEntry]:
        try:
            found = [*os.scandir(self._local(path))]
        except (FileNotFoundError, NotADirectoryError):
            return
        for each in found:
            relative = self.join(path, each.name)
            if each.is_dir(follow_symlinks=False):
                if recursive:
                    yield from self._local_entries(relative, recursive)
                continue
            with contextlib.suppress(FileNotFoundError):
                stat = each.stat()
                yield StorageEntry(relative, stat.st_size, stat.st_mtime)

    def _remote_entries(self, path: str, recursive: bool) -> Iterator[StorageEntry]:
        found = self._fs.find(self._remote(path), maxdepth=None if recursive else 1, detail=True)
        for each in found.values():
            name = each["name"].strip("/").removeprefix(self._root.strip("/")).strip("/")
            if each["type"] == "file" and name != path:  # `find` of a file is that file
                yield StorageEntry(name, int(each["size"]), _time_of(each))

    @contextlib.contextmanager
    def _translated(self, action: str, path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:  # each object store's client has its own tree of errors
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"cannot {action} {self.full(path)}: {error}") from error

    @contextlib.contextmanager
    def _replacing(self, target: Path, path: str) -> Iterator[IO[bytes]]:
        with self._translated("write", path):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.parent / f".tmp-{uuid.uuid4().hex}"
            file = temporary.open("xb")
        try:
            with file:
                yield file
                with self._translated("write", path):
                    file.flush()
                    os.fsync(file.fileno())
            with self._translated("write", path):
                temporary.replace(target)
                _sync_folder(target.parent)
        except OSError as error:
            raise StorageError(f"cannot write {self.full(path)}: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)

    def _link_exclusive(self, target: Path, data: bytes) -> bool:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".tmp-{uuid.uuid4().hex}"
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                target.hardlink_to(temporary)
            except FileExistsError:
                return False
            _sync_folder(target.parent)
            return True
        finally:
            temporary.unlink(missing_ok=True)

    def _put_exclusive(self, target: str, data: bytes) -> bool:
        for attempt in range(_CREATE_ATTEMPTS):
            try:
                # fsspec's memory files have no atomic create of their own.
                with _memory_lock if self._protocol == "memory" else contextlib.nullcontext():
                    self._fs.pipe_file(target, data, mode="create")
                return True
            except OSError as error:
                code = _answer_code(error)
                if isinstance(error, FileExistsError) or code in _LOST_RACE_CODES:
                    return False
                if code not in _TRY_AGAIN_CODES or attempt == _CREATE_ATTEMPTS - 1:
                    raise
        raise AssertionError("the loop returns or raises")


def _answer_code(error: BaseException) -> str | None:
    response = getattr(error.__cause__, "response", None)
    if not isinstance(response, dict):
        return None
    code = response.get("Error", {}).get("Code")
    return None if code is None else str(code)


def _time_of(found: Mapping[str, Any]) -> float:
    """When a file was written, from what fsspec's clients tell of it under different names."""
    names = ("LastModified", "last_modified", "mtime", "modified", "updated", "created")
    time = next((found[name] for name in names if found.get(name) is not None), None)
    if isinstance(time, str):
        time = datetime.fromisoformat(time)
    if isinstance(time, datetime):
        return time.timestamp()
    if isinstance(time, int | float):
        return float(time)
    raise StorageError(f"the storage tells no time of {found.get('name')}: ages of files cannot be known there")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
