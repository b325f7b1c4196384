"""The one door to files: a folder, file://, s3:// and whatever else fsspec opens (memory:// in tests).

Foreign errors are translated here: a missing file is FileNotFoundError, everything else StorageError with its cause.
"""

import contextlib
import io
import os
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.core import split_protocol
from fsspec.utils import stringify_path
from tenacity import RetryError

from featurestore.errors import CorruptFileError, StorageError
from featurestore.storage.local import TEMPORARY, DiskFiles, StorageEntry
from featurestore.storage.retries import is_passing, persist, says_exists, was_not_done

_S3_PROTOCOLS = ("s3", "s3a")
# Listings would hide new commits; one layer retries, that of featurestore.storage.retries.
_S3_OPTIONS = {"use_listings_cache": False, "config_kwargs": {"retries": {"total_max_attempts": 1}}}
_READ_AHEAD_BYTES = 256 << 10
_PIECE_BYTES = 16 << 20
_DELETE_THREADS = 16  # waiting for answers, not computing
_clients: dict[tuple[object, ...], Any] = {}
_clients_lock = threading.Lock()
_memory_lock = threading.Lock()

Names = list[str]  # inside the classes, `list` is the method
Entries = list[StorageEntry]


class Storage:
    """Files below one address; every path is relative to it, with forward slashes.

    On an object store throttling, failures of the server, cut connections and timeouts are tried again for a minute.
    On a disk, with `keep_inside`, a symbolic link that leads out of the folder is damage (CorruptFileError): stores are
    opened so. Pickles as its address. The client is made on first use in each process, so never shared across a fork.
    """

    def __init__(self, url: str | os.PathLike[str], keep_inside: bool = False) -> None:
        text = stringify_path(url)
        protocol, path = split_protocol(text)
        self._protocol = protocol or "file"
        self._root = str(Path(path).absolute()) if self.is_local else path.rstrip("/")
        self.url = self._root if self.is_local else f"{self._protocol}://{self._root.lstrip('/')}"
        self._keep_inside = keep_inside
        self._disk = DiskFiles(self._root, keep_inside)
        self._remote = RemoteFiles(self._protocol, self._root)
        self._files: DiskFiles | RemoteFiles = self._disk if self.is_local else self._remote

    def __reduce__(self) -> tuple[type["Storage"], tuple[str, bool]]:
        return Storage, (self.url, self._keep_inside)

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

    def read_into(self, path: str, out: memoryview) -> int:
        """Fill `out` from the beginning of the file; the file's size in bytes, which the caller compares with that of
        `out`. Raises FileNotFoundError where there is none."""
        with self._translated("read", path):
            return self._files.read_into(path, out)

    def read_bytes(self, path: str) -> bytes:
        """The whole file. Raises FileNotFoundError where there is none."""
        with self._translated("read", path):
            return self._files.read_bytes(path)

    def write_bytes(self, path: str, data: bytes) -> None:
        """Create or replace the file; a reader sees the old content or the new, never a part."""
        with self.open_output(path) as file:
            file.write(data)

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Create the file unless it exists: True when made here, False when another was there first.

        An error leaves open whether the file was made (a lost answer), and on an object store False can be said of
        one's own file (the answer to the first try was lost): read the file back to know. Tried again only where the
        server says that it did nothing.
        """
        with self._translated("create", path, writing=True):
            return self._files.create_exclusive(path, data)

    def create_or_read(self, path: str, data: bytes) -> bytes:
        """What stands under the name after an exclusive create: `data` where this call made the file.

        The file is read back after success and after every error, and decides, not the answer: so `data` must be like
        no other's. Passing errors are tried again. Raises StorageError: then nobody knows yet whether it was made.
        """

        def settle() -> bytes:
            failure: StorageError | None = None
            try:
                self.create_exclusive(path, data)
            except StorageError as error:
                failure = error
            try:
                return self.read_bytes(path)
            except FileNotFoundError:
                if failure is not None:
                    raise failure from failure.__cause__
                raise StorageError(f"{self.full(path)} vanished after it was created") from None

        try:
            return settle() if self.is_local else persist(settle, lambda error: is_passing(error.__cause__))
        except RetryError as error:
            raise error.last_attempt.exception() or error from None

    def list(self, path: str = "") -> Names:
        """Names (not paths) directly below `path`, sorted; empty where nothing is there. Temporary files are hidden."""
        with self._translated("list", path):
            try:
                names = self._files.list(path)
            except FileNotFoundError:
                return []
        return sorted(name for name in names if not name.startswith(TEMPORARY))

    def entries(self, path: str = "", recursive: bool = True) -> Entries:
        """The files below `path`, by path; temporary files (`.tmp-…`) included, folders not; empty where nothing is.

        On an object store one flat listing, 1,000 files an answer. A file that vanishes meanwhile is left out.
        """
        with self._translated("list", path), contextlib.suppress(FileNotFoundError):
            return sorted(self._files.entries(path, recursive))
        return []

    def now(self) -> float:
        """Seconds since 1970 by the clock that stamps the files here: that of the disk or of the object store.

        Writes, looks at and removes a small file. Ages are told by it, as this machine's own clock may differ.
        """
        probe = f"{TEMPORARY}clock-{uuid.uuid4().hex}"
        self.write_bytes(probe, b"")
        try:
            return self.entry(probe).mtime_s
        finally:
            self.delete_files([probe])

    def entry(self, path: str) -> StorageEntry:
        """Size and time of one file. Raises FileNotFoundError where there is none."""
        with self._translated("look at", path):
            return self._files.entry(path)

    def size(self, path: str) -> int:
        """Bytes of the file. Raises FileNotFoundError where there is none."""
        return self.entry(path).size_bytes

    def delete(self, path: str) -> None:
        """Remove a file, or a folder with all below it; nothing happens where nothing is there."""
        with self._translated("delete", path), contextlib.suppress(FileNotFoundError):
            self._files.delete(path)

    def delete_files(self, paths: Iterable[str]) -> None:
        """Remove files, one request for each, many at a time; nothing happens where one is not there."""
        with self._translated("delete files in", ""):
            self._files.delete_files(paths)

    def open_input(self, path: str) -> IO[bytes]:
        """The file for reading, seekable; only what is asked for is fetched. Raises FileNotFoundError."""
        with self._translated("open", path):
            if self.is_local:
                return self._disk.open_input(path)
            reader = _RangeReader(self, path, self.size(path))
            return io.BufferedReader(reader, _READ_AHEAD_BYTES)

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end` of a file on an object store. Raises FileNotFoundError where there is none."""
        with self._translated("read", path):
            return self._remote.read_bytes(path, start, end)

    @contextlib.contextmanager
    def open_output(self, path: str) -> Iterator[IO[bytes]]:
        """A file to write that appears under its name when the block ends, and not at all when the block raises."""
        if not self.is_local:
            # An exception inside s3fs' own open(path, "wb") leaves half an object: it is put in one piece instead.
            buffer = io.BytesIO()
            yield buffer
            with self._translated("write", path, writing=True):
                self._remote.write_bytes(path, buffer.getvalue())
            return
        try:
            with self._disk.open_output(path) as file:
                yield file
        except OSError as error:
            raise StorageError(f"cannot write {self.full(path)}: {error}") from error

    @contextlib.contextmanager
    def _translated(self, action: str, path: str, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except RetryError as error:
            cause = error.last_attempt.exception()
            tries = f"tried {error.last_attempt.attempt_number} times"
            raise StorageError(f"cannot {action} {self.full(path)}: {_reason(cause)} ({tries})") from cause
        except Exception as error:  # each object store's client has its own tree of errors
            if isinstance(error, StorageError | CorruptFileError) or (
                isinstance(error, FileNotFoundError) and not writing
            ):
                raise
            hint = "; are the credentials right?" if isinstance(error, PermissionError) and not self.is_local else ""
            raise StorageError(f"cannot {action} {self.full(path)}: {_reason(error)}{hint}") from error


class RemoteFiles:
    """Files of an object store through fsspec, with retries; errors are the client's own, or tenacity's at the end."""

    def __init__(self, protocol: str, root: str) -> None:
        self._protocol = protocol
        self._root = root
        self._client: tuple[int, Any] | None = None

    @property
    def client(self) -> Any:
        """fsspec's file system, made once in each process."""
        if self._client is None or self._client[0] != os.getpid():
            self._client = os.getpid(), _client(self._protocol)
        return self._client[1]

    def read_bytes(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """The file, or a part of it."""
        data: bytes = persist(lambda: self.client.cat_file(self._full(path), start=start, end=end))
        return data

    def read_into(self, path: str, out: memoryview) -> int:
        """The beginning of the file in pieces, so that no second copy of it stands in memory; its size."""
        size_bytes = self.entry(path).size_bytes
        end = min(size_bytes, len(out))
        for start in range(0, end, _PIECE_BYTES):
            piece = self.read_bytes(path, start, min(start + _PIECE_BYTES, end))
            out[start : start + len(piece)] = piece
        return size_bytes

    def write_bytes(self, path: str, data: bytes) -> None:
        """Create or replace the file, in one piece."""
        persist(lambda: self.client.pipe_file(self._full(path), data))

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """One conditional put; the answer may be lost, or be about one's own file."""
        # fsspec's memory files have no atomic create of their own.
        guard = _memory_lock if self._protocol == "memory" else contextlib.nullcontext()

        def create() -> bool:
            try:
                with guard:
                    self.client.pipe_file(self._full(path), data, mode="create")
            except Exception as error:  # each object store's client has its own tree of errors
                if says_exists(error):
                    return False
                raise
            return True

        return persist(create, was_not_done)

    def list(self, path: str) -> Names:
        """Names below a path."""
        found: Names = persist(lambda: self.client.ls(self._full(path), detail=False))
        here = self._full(path).strip("/")
        return [entry.rstrip("/").rsplit("/", 1)[-1] for entry in found if entry.strip("/") != here]

    def entry(self, path: str) -> StorageEntry:
        """Size and time of one file."""
        found = persist(lambda: self.client.info(self._full(path)))
        if found["type"] != "file":
            raise FileNotFoundError(path)
        return _entry(path, found)

    def entries(self, path: str, recursive: bool) -> Iterator[StorageEntry]:
        """Files below a path, from one flat listing or from that of one folder."""
        # Not find(maxdepth=1): it walks, and leaves out what it cannot list instead of raising.
        find = self.client.find if recursive else self.client.ls
        found = persist(lambda: find(self._full(path), detail=True))
        for each in found.values() if recursive else found:
            name = each["name"].strip("/").removeprefix(self._root.strip("/")).strip("/")
            if each["type"] == "file" and name != path:  # `find` of a file is that file
                yield _entry(name, each)

    def delete(self, path: str) -> None:
        """Remove a file, or all files below a path."""
        # Not by the client's own rm: it takes [ and * for patterns, and s3fs's keeps silent where a delete failed.
        below = persist(lambda: self.client.find(self._full(path), detail=False))
        self._delete_each(below or [])

    def delete_files(self, paths: Iterable[str]) -> None:
        """Remove files."""
        self._delete_each([self._full(path) for path in paths])

    def _delete_each(self, places: Names) -> None:
        def remove(place: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                persist(lambda: self.client.rm_file(place))

        if places:
            with ThreadPoolExecutor(min(len(places), _DELETE_THREADS)) as pool:
                list(pool.map(remove, places))

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root


class _RangeReader(io.RawIOBase):
    """A file of an object store; each read is one request for a range, tried again like any other.

    The clients' own files give up early, and their errors would be taken for damage of the file.
    """

    def __init__(self, storage: Storage, path: str, size_bytes: int) -> None:
        self._storage, self._path, self._size_bytes = storage, path, size_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size_bytes)
        if end <= self._position:
            return 0
        data = self._storage.read_range(self._path, self._position, end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _client(protocol: str) -> Any:
    """fsspec's file system: one for each process and setting of the environment, as making one takes half a second."""
    settings = sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    key = (os.getpid(), protocol, *settings)
    with _clients_lock:
        if key not in _clients:
            try:
                if protocol in _S3_PROTOCOLS:
                    _clients[key] = fsspec.filesystem(protocol, skip_instance_cache=True, **_S3_OPTIONS)
                    _clients[key].retries = 1
                else:
                    _clients[key] = fsspec.filesystem(protocol)
            except (ValueError, ImportError) as error:
                raise StorageError(f"{protocol}:// cannot be opened: {error}") from error
        return _clients[key]


def _forget_clients() -> None:
    """In the child of a fork: the parent's clients do not work there, and its locks may be held for ever."""
    global _clients_lock, _memory_lock
    _clients.clear()
    _clients_lock, _memory_lock = threading.Lock(), threading.Lock()


os.register_at_fork(after_in_child=_forget_clients)


def _reason(error: BaseException | None) -> str:
    return str(error) or type(error).__name__


def _entry(path: str, found: Mapping[str, Any]) -> StorageEntry:
    tag = found.get("ETag") or found.get("etag") or ""
    return StorageEntry(path, int(found["size"]), _time_of(found), str(tag).strip('"'))


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
