"""Storage: files below one address, on a disk or at an object store; and threads that wait for several of them.

Foreign errors are translated here: a missing file is FileNotFoundError, everything else StorageError with its cause.
"""

import contextlib
import errno
import io
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import IO, Any, Generic, Self, TypeVar, overload

import xxhash

from featurestore.errors import AddressError, BucketNotFoundError, CorruptFileError, NotAFolderError, StorageError
from featurestore.problems import Problem
from featurestore.storage import remote
from featurestore.storage.local import TEMPORARY, DiskFiles, StorageEntry
from featurestore.text import refusal

_READ_AHEAD_BYTES = 256 << 10
_MAX_PROBES = 5

Entries = list[StorageEntry]  # inside the class, `list` is the method
Progress = Callable[[int, int], None]  # things done, things in all
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Storage:
    """Files below one address; every path is relative to it, with forward slashes.

    A path that leads out of it raises StorageError; so does the address itself where something is to be changed or
    removed, and on a disk a removal through a symbolic link that leads out.

    On an object store throttling, failures of the server, cut connections and timeouts are tried again for a minute, at
    a web server for some seconds; one that was not reached is left alone for ten minutes.
    On a disk, with `keep_inside`, a symbolic link that leads out of the folder, a folder in the place of a file and a
    sector that cannot be read are damage (CorruptFileError): stores are opened so. Pickles as its address. The client
    is made on first use in each process, so never shared across a fork.
    """

    def __init__(self, url: str | os.PathLike[str], keep_inside: bool = False) -> None:
        """Open a place. Raises PasswordError where the address has one, AddressError where it has no bucket."""
        remote.check_password(str(url))
        self._protocol, path = remote.protocol_and_path(url)
        self._root = str(Path(path).absolute()) if self.is_local else path.rstrip("/")
        self.url = self._root if self.is_local else f"{self._protocol}://{self._root}"
        self._keep_inside = keep_inside
        self._disk = DiskFiles(self._root, keep_inside)
        self._remote = remote.RemoteFiles(self._protocol, self._root)
        self._files: DiskFiles | remote.RemoteFiles = self._disk if self.is_local else self._remote

    def __reduce__(self) -> tuple[type["Storage"], tuple[str, bool]]:
        return Storage, (self.url, self._keep_inside)

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    @property
    def is_local(self) -> bool:
        """Whether the files are on a disk of this machine, so that they can be linked and mapped."""
        return self._protocol in ("file", "local")

    def check_bucket(self) -> None:
        """Raise BucketNotFoundError where the object store has no such bucket: there, reading just finds nothing.

        One request. Raises StorageError.
        """
        with self._translated("list", ""):
            try:
                if not self.is_local:
                    self._remote.list("")
            except FileNotFoundError as error:
                if remote.lacks_bucket(error):
                    raise BucketNotFoundError(Problem.NO_BUCKET, "use", self.url, self._bucket) from error

    @property
    def _bucket(self) -> str:
        return self._root.lstrip("/").split("/")[0]

    def full(self, path: str) -> str:
        """Return the address of `path`, for messages and for other tools."""
        return f"{self.url}/{path}" if path else self.url

    def read_into(self, path: str, out: memoryview) -> int:
        """Fill `out` from the beginning of the file; return the file's size in bytes, to be compared with `out`.

        Raises FileNotFoundError where there is none."""
        with self._translated("read", path):
            return self._files.read_into(path, out)

    def read_bytes(self, path: str) -> bytes:
        """Read the whole file. Raises FileNotFoundError where there is none."""
        with self._translated("read", path):
            return self._files.read_bytes(path)

    def write_bytes(self, path: str, data: bytes | bytearray) -> None:
        """Create or replace the file; a reader sees the old content or the new, never a part."""
        if not self.is_local:
            with self._translated("write", path, writing=True):
                self._remote.write_bytes(path, data)
            return
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
        """Create the file unless it exists, and return its content: `data` if this call created it.

        The file is read back after success and after every error, and decides, not the answer: so `data` must be like
        no other's. Transient errors are tried again. Raises StorageError: then it is not known whether it was made.
        """

        remote.check_below(path, self.url, writing=True)

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
                raise StorageError(Problem.VANISHED, self.full(path)) from None

        try:
            if self.is_local:
                return settle()
            return remote.with_retries(settle, lambda error: remote.is_transient(error.__cause__))
        except remote.RetriesExhaustedError as error:
            raise error.last from None

    def list(self, path: str = "") -> remote.Names:
        """List names (not paths) directly below `path`, sorted; empty where nothing is there.

        Temporary files are hidden."""
        with self._translated("list", path):
            try:
                names = self._files.list(path)
            except FileNotFoundError:
                return []
        return sorted(name for name in names if not name.startswith(TEMPORARY))

    def entries(self, path: str = "", recursive: bool = True) -> Entries:
        """List the files below `path`, by path; empty where nothing is.

        Temporary files (`.tmp-…`) are included, folders are not. On an object store one flat listing, 1,000 files an
        answer. A file that vanishes meanwhile is left out.
        """
        with self._translated("list", path), contextlib.suppress(FileNotFoundError):
            return sorted(each for each in self._files.entries(path, recursive) if not remote.leads_out(each.path))
        return []

    def iter_entries(self, path: str = "") -> Iterator[StorageEntry]:
        """List the files below `path` as `entries`, in any order and none of them held.

        A key of an object store whose parts lead out of the place is given too: reading it raises StorageError."""
        with self._translated("list", path), contextlib.suppress(FileNotFoundError):
            yield from self._files.entries(path, recursive=True)

    def now(self) -> float:
        """Return seconds since 1970 by the clock that stamps the files here: that of the disk or of the object store.

        Writes, looks at and removes a small file. Ages are counted by it, as this machine's own clock may differ.
        """
        for _ in range(_MAX_PROBES):
            probe = f"{TEMPORARY}clock-{uuid.uuid4().hex}"
            self.write_bytes(probe, b"")
            try:
                return self.entry(probe).mtime_s
            except FileNotFoundError:  # an expiry took it for a leftover, as this process was away for long
                continue
            finally:
                self.delete_files([probe])
        raise StorageError(Problem.PROBE_VANISHED, self.url, _MAX_PROBES)

    def entry(self, path: str) -> StorageEntry:
        """Look up size and time of one file. Raises FileNotFoundError where there is none."""
        with self._translated("look at", path):
            return self._files.entry(path)

    def size(self, path: str) -> int:
        """Return the bytes of the file. Raises FileNotFoundError where there is none."""
        return self.entry(path).size_bytes

    def delete(self, path: str) -> None:
        """Remove a file, or a folder with all below it; nothing happens where nothing is there."""
        remote.check_below(path, self.url, writing=True)
        with self._translated("delete", path), contextlib.suppress(FileNotFoundError):
            self._files.delete(path)

    def delete_files(self, paths: Iterable[str]) -> None:
        """Remove files, one request for each, many at a time; ignore missing ones."""
        paths = list(paths)
        for path in paths:
            remote.check_below(path, self.url, writing=True)
        with self._translated("delete files in", ""):
            self._files.delete_files(paths)

    def open_input(self, path: str) -> IO[bytes]:
        """Open the file for reading, seekable; fetches only the bytes that are read. Raises FileNotFoundError."""
        with self._translated("open", path):
            if self.is_local:
                return self._disk.open_input(path)
            reader = _RangeReader(self, path, self.size(path))
            return io.BufferedReader(reader, _READ_AHEAD_BYTES)

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Read bytes `start` to `end` of a file on an object store. Raises FileNotFoundError where there is none."""
        with self._translated("read", path):
            return self._remote.read_bytes(path, start, end)

    @contextlib.contextmanager
    def open_output(self, path: str) -> Iterator[IO[bytes]]:
        """Open a file to write that gets its name when the block ends, and does not appear when the block raises."""
        remote.check_below(path, self.url, writing=True)
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
            raise self._disk_error("write", path, error) from error

    @contextlib.contextmanager
    def _translated(self, action: str, path: str, writing: bool = False) -> Iterator[None]:
        remote.check_below(path, self.url, writing)
        try:
            yield
        except remote.RetriesExhaustedError as error:
            reason = remote.reason_of(error.last)
            raise StorageError(Problem.REFUSED_OFTEN, action, self.full(path), reason, error.tries) from error.last
        except Exception as error:  # each object store's client has its own tree of errors
            if isinstance(error, AddressError | StorageError | CorruptFileError) or (
                isinstance(error, FileNotFoundError) and not writing
            ):
                raise
            if remote.lacks_bucket(error):
                raise BucketNotFoundError(Problem.NO_BUCKET, action, self.full(path), self._bucket) from error
            if self._keep_inside and self.is_local and getattr(error, "errno", 0) == errno.EIO and not writing:
                raise CorruptFileError(Problem.DISK_CANNOT_READ, self.full(path), error) from error
            if self._keep_inside and isinstance(error, IsADirectoryError) and not writing:
                raise CorruptFileError(Problem.FOLDER_NOT_FILE, self.full(path)) from error
            if self.is_local:
                raise self._disk_error(action, path, error) from error
            reason = remote.reason_of(error)
            if isinstance(error, PermissionError):
                raise StorageError(Problem.NO_PERMISSION, action, self.full(path), reason.removesuffix(".")) from error
            raise StorageError(Problem.REFUSED, action, self.full(path), reason) from error

    def _disk_error(self, action: str, path: str, error: Exception) -> StorageError:
        full = Path(self.full(path))
        if isinstance(error, NotADirectoryError | FileExistsError):
            file = next((part for part in reversed(full.parents) if part.exists() and not part.is_dir()), full)
            return NotAFolderError(Problem.FILE_NOT_FOLDER, file)
        reason = refusal(error) if isinstance(error, OSError) else remote.reason_of(error)
        return StorageError(Problem.REFUSED, action, full, reason)


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


_BLOCK_BYTES = 8 << 20
_SETTLED_S = 2.0  # a file that changes twice within a tick of the clock may keep its tag
_ALONE_S = 0.02  # before other threads begin


def file_at(address: str) -> tuple[Storage, str]:
    """Split the address of a file into its folder and its name there. Raises AddressError where it has no folder."""
    folder, slash, name = address.rpartition("/")
    if "://" in address and "://" not in folder:  # else a folder of this machine: "foo:"
        raise AddressError(Problem.NOT_A_FILE_ADDRESS, address, name or "FILE")
    return Storage(folder or slash or "."), name


def digest_of(storage: Storage, path: str, algorithm: Callable[[], Any] = xxhash.xxh3_128) -> str:
    """Compute a digest of the bytes of a file, in hexadecimal. Raises OSError, StorageError."""
    digest = algorithm()
    with storage.open_input(path) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return str(digest.hexdigest())


def settled_tags(entries: Iterable[StorageEntry]) -> dict[str, str]:
    """Return the tags of files by path, for those old enough that a changed file has another tag."""
    settled_s = time.time() - _SETTLED_S
    return {entry.path: entry.tag for entry in entries if entry.tag and entry.mtime_s < settled_s}


def in_threads(
    work: Callable[[ItemT], ResultT],
    items: Collection[ItemT],
    threads: int,
    progress: Progress | None = None,
    ahead: int | None = None,
) -> Iterator[ResultT]:
    """Yield the result of `work` for each of `items`, in their order; `progress` is called after each.

    At most `ahead` items, by default all, wait to be begun or asked for. An error of one ends it: the others stay.
    At first one thread works alone: where the items are small files of a disk, several spend half of the processor on
    handing Python's lock to each other.
    """
    waiting, is_alone = iter(items), True
    with ThreadPoolExecutor(threads) as pool:
        running = deque(pool.submit(work, item) for item in islice(waiting, 1))
        end_s = time.monotonic() + _ALONE_S
        try:
            for done in range(1, len(items) + 1):
                if is_alone and not wait([running[0]], max(0.0, end_s - time.monotonic())).done:
                    is_alone = False
                    running.extend(pool.submit(work, item) for item in islice(waiting, ahead and ahead - 1))
                result = running.popleft().result()
                running.extend(pool.submit(work, item) for item in islice(waiting, 1))
                yield result
                if progress is not None:
                    progress(done, len(items))
        finally:
            pool.shutdown(cancel_futures=True)


class cached_property(Generic[ResultT]):  # noqa: N801 - it takes the place of functools'
    """A property that is computed when it is first asked for, and kept; no thread waits for another.

    Before Python 3.12 functools' has one lock for all instances of a class, and holds it while it computes: reads of
    shards by several threads came one after the other. Two threads that ask one instance at once compute it twice.
    """

    def __init__(self, compute: Callable[[Any], ResultT]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type) -> ResultT: ...

    def __get__(self, instance: object | None, owner: type) -> Self | ResultT:
        if instance is None:
            return self
        result: ResultT = self._compute(instance)
        instance.__dict__[self._name] = result
        return result
