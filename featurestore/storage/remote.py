"""Storage at object stores: addresses, clients, retries and exclusive creates.

The clients' own retries are switched off: one layer decides, with one patience, and says at the end how often it tried.
fsspec and tenacity are imported with the first request: a quarter of the start of a command whose files are on a disk.
"""

import contextlib
import errno
import functools
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

from featurestore.errors import AddressError, PasswordError, StorageError, UnsafeBackendError
from featurestore.problems import Problem
from featurestore.storage.local import TEMPORARY, StorageEntry
from featurestore.text import one_line, without_passwords

if TYPE_CHECKING:
    from tenacity import RetryCallState


PATIENCE_S = 60.0  # a restarted server is back by then
HTTP_PATIENCE_S = 5.0  # a table of images may name many servers that are gone
_HTTP_SILENCE_S = 10.0  # within an answer
_UNREACHED_S = 600.0  # for which a server of http that was not reached is not asked again
_WARN_AFTER_S = 5.0
FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0

_LOST_RACE_CODES = {"PreconditionFailed", "412"}
_CONFLICT_CODES = {"ConditionalRequestConflict", "OperationAborted", "409"}
_THROTTLE_CODES = {"SlowDown", "ServiceUnavailable", "TooManyRequests", "RequestLimitExceeded", "Throttling"}
_THROTTLE_CODES |= {"ThrottlingException", "429", "503"}
_SERVER_CODES = {"InternalError", "RequestTimeout", "IncompleteBody", "BadDigest", "500", "502", "504"}
_SERVER_STATUSES = {500, 502, 503, 504}
_HTTP_STATUSES = _SERVER_STATUSES | {408, 429}
_TRANSIENT_ERRNOS = {errno.EBUSY, errno.EIO, errno.EREMOTEIO, errno.EAGAIN, errno.EPIPE, errno.ETIMEDOUT}
# By name, as importing the clients takes longer than most commands run.
_TRANSIENT_CLASSES = {"ConnectionError", "HTTPClientError", "ResponseParserError", "ClientError", "IncompleteRead"}
_UNREACHED_CLASSES = {"ClientConnectorError", "ConnectionTimeoutError"}
_CLIENT_PACKAGES = ("botocore", "aiohttp", "urllib3")

# Listings would hide new commits; one layer retries, this one. With more at once, s3fs asks for the size of each file
# before it reads it: two requests, three for a missing file. What is large is read by ranges here.
_S3_OPTIONS = {
    "use_listings_cache": False,
    "config_kwargs": {"retries": {"total_max_attempts": 1}},
    "max_concurrency": 1,
}
_PARTS_AT_ONCE = 10  # of a large file that is written
_PIECE_BYTES = 16 << 20
_DELETE_THREADS = 16  # waiting for answers, not computing
HDFS = "hdfs"
_clients: dict[tuple[object, ...], Any] = {}
_unreached_until_s: dict[str, float] = {}  # by server of http, on the clock of time.monotonic
_clients_lock = threading.Lock()
_memory_lock = threading.Lock()

_log = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")
Names = list[str]  # inside the classes, `list` is the method


def protocol_and_path(url: str | os.PathLike[str]) -> tuple[str, str]:
    """Split an address into its protocol, "file" by default, and the rest. Raises AddressError."""
    address = os.fspath(url)
    check_address(address)
    protocol, separator, path = address.partition("://")
    return (protocol, path) if separator else ("file", address)


def check_password(address: str, name: str = "") -> None:
    """Raise PasswordError where an address has one; `name`: of the variable that has the address."""
    hidden = without_passwords(address)
    if hidden != address:
        raise PasswordError(Problem.PASSWORD_IN_ADDRESS, name, hidden)


def check_endpoint() -> None:
    """Raise PasswordError where the address of the object store, in the environment, has a password."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        check_password(os.environ.get(name, ""), f"{name}=")


class RemoteFiles:
    """Files of an object store, behind `Storage`, which documents the methods, with retries.

    Errors are the client's own, or RetriesExhaustedError at the end.
    """

    def __init__(self, protocol: str, place: str) -> None:
        self._protocol, self._place = protocol, place
        self._http_server = place.partition("/")[0] if protocol in HTTP_PROTOCOLS else ""
        self._client: tuple[int, Any] | None = None

    @property
    def client(self) -> Any:
        """fsspec's file system, made once in each process."""
        if self._client is None or self._client[0] != os.getpid():
            self._client = os.getpid(), _client(self._protocol, self._place)
        return self._client[1]

    @property
    def _root(self) -> str:
        """The place as its client names it: some leave out the server, some want the whole address."""
        if self._protocol in S3_PROTOCOLS:
            return self._place
        if self._protocol == HDFS:
            return f"/{self._place.partition('/')[2]}"
        return str(self.client._strip_protocol(f"{self._protocol}://{self._place}"))

    def read_bytes(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        options = {"seekable": True} if self._protocol == HDFS else {}  # a stream of it cannot be read as a whole
        data: bytes = self._read(lambda: self.client.cat_file(self._full(path), start=start, end=end, **options))
        if start is None or end is None or len(data) <= end - start:
            return data
        return data[start:end]  # some web servers send the whole file

    def read_into(self, path: str, out: memoryview) -> int:
        """Fill `out` from the beginning of the file in pieces, without a second copy in memory; return its size."""
        size_bytes = self.entry(path).size_bytes
        end = min(size_bytes, len(out))
        for start in range(0, end, _PIECE_BYTES):
            piece = self.read_bytes(path, start, min(start + _PIECE_BYTES, end))
            out[start : start + len(piece)] = piece
        return size_bytes

    def write_bytes(self, path: str, data: bytes | bytearray) -> None:
        if self._protocol == HDFS:  # it shows a file while it is written
            temporary = self._full(f"{path.rpartition('/')[0]}/{TEMPORARY}{uuid.uuid4().hex}".lstrip("/"))
            with_retries(lambda: self.client.pipe_file(temporary, data))
            with_retries(lambda: self.client.mv(temporary, self._full(path)))
            return
        parts = {"max_concurrency": _PARTS_AT_ONCE} if self._protocol in S3_PROTOCOLS else {}
        with_retries(lambda: self.client.pipe_file(self._full(path), data, **parts))

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Do one conditional put; the answer may be lost, or be about one's own file."""
        if _looks_before_it_creates(self.client):
            raise UnsafeBackendError(Problem.NO_ATOMIC_CREATE, self._protocol)
        # fsspec's memory files have no atomic create of their own.
        guard = _memory_lock if self._protocol == "memory" else contextlib.nullcontext()

        def create() -> bool:
            try:
                with guard:
                    self.client.pipe_file(self._full(path), data, mode="create")
            except Exception as error:  # each object store's client has its own tree of errors
                # It exists: servers and clients say it in three ways.
                if isinstance(error, FileExistsError) or answer_code(error) in _LOST_RACE_CODES:
                    return False
                raise
            return True

        return with_retries(create, was_not_done)

    def list(self, path: str) -> Names:
        found: Names = with_retries(lambda: self.client.ls(self._full(path), detail=False))
        here = self._full(path).strip("/")
        names = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in found if entry.strip("/") != here]
        return [name for name in names if not leads_out(name)]

    def entry(self, path: str) -> StorageEntry:
        def look() -> dict[str, Any]:
            try:
                found: dict[str, Any] = self.client.info(self._full(path))
            except FileNotFoundError as error:  # so the client of http says that it could not ask, too
                if error.__cause__ is not None and is_transient(error.__cause__):
                    raise error.__cause__ from None
                raise
            return found

        found = self._read(look)
        if found["type"] != "file":
            raise FileNotFoundError(path)
        return _entry(path, found)

    def entries(self, path: str, recursive: bool) -> Iterator[StorageEntry]:
        """List the files below a path: on S3 from one flat listing, elsewhere folder by folder.

        Not by the clients' `find`: that of s3fs holds a record of each file until it has all, and fsspec's leaves out
        folders that it cannot list.
        """
        if recursive and self._protocol in S3_PROTOCOLS:
            yield from self._objects(path)
            return
        for each in with_retries(lambda: self.client.ls(self._full(path), detail=True)):
            name = self._name(each["name"])
            if name == path:  # a file lists itself, and some clients list the folder too
                continue
            if each["type"] == "file":
                yield _entry(name, each)
            elif recursive:
                with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                    yield from self.entries(name, recursive)

    def _objects(self, path: str) -> Iterator[StorageEntry]:
        """List the objects of S3 below a path, page by page."""
        bucket, folder, _ = self.client.split_path(self._full(path))
        request = {"Bucket": bucket, "Prefix": f"{folder}/" if folder else "", **self.client.req_kw}
        while request:
            page = with_retries(functools.partial(self.client.call_s3, "list_objects_v2", **request))
            for each in page.get("Contents", ()):
                if not each["Key"].endswith("/"):  # an empty object that stands for a folder
                    yield _entry(self._name(f"{bucket}/{each['Key']}"), {**each, "size": each["Size"]})
            token = page.get("NextContinuationToken") if page.get("IsTruncated") else None
            request = {**request, "ContinuationToken": token} if token else {}

    def delete(self, path: str) -> None:
        # Not by the client's own rm: it takes [ and * for patterns, and s3fs's keeps silent where a delete failed.
        below = with_retries(lambda: self.client.find(self._full(path), detail=False))
        # Clients treat a/../b as b, so objects with such keys are not removed.
        self._delete_each([place for place in below or [] if not leads_out(self._name(place))])

    def delete_files(self, paths: Iterable[str]) -> None:
        self._delete_each([self._full(path) for path in paths])

    def _delete_each(self, places: Names) -> None:
        def remove(place: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                with_retries(lambda: self.client.rm_file(place))

        with ThreadPoolExecutor(_DELETE_THREADS) as pool:
            list(pool.map(remove, places))

    def _read(self, work: Callable[[], ResultT]) -> ResultT:
        """Do as `with_retries`; over http not for long, and not again soon with a server that was not reached."""
        if not self._http_server:
            return with_retries(work)
        if time.monotonic() < _unreached_until_s.get(self._http_server, 0.0):
            raise StorageError(Problem.NOT_REACHED, self._http_server)
        try:
            return with_retries(work, patience_s=HTTP_PATIENCE_S)
        except RetriesExhaustedError as failure:
            if is_unreached(failure.last):
                _unreached_until_s[self._http_server] = time.monotonic() + _UNREACHED_S
            raise

    def _name(self, place: str) -> str:
        """Return a place as a path relative to the root."""
        return place.strip("/").removeprefix(self._root.strip("/")).strip("/")

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root


class RetriesExhaustedError(Exception):
    """A request has failed for as long as it was tried: its last error, and how often it was tried."""

    def __init__(self, last: BaseException, tries: int) -> None:
        super().__init__(last, tries)
        self.last, self.tries = last, tries


def with_retries(
    work: Callable[[], ResultT],
    retry_if: Callable[[BaseException], bool] | None = None,
    patience_s: float | None = None,
) -> ResultT:
    """Return the result of `work`, tried again with growing waits for up to `patience_s` while `retry_if` says so.

    By default that is PATIENCE_S, and it says so of transient errors. Raises RetriesExhaustedError at the end, other
    errors at once.
    """
    from tenacity import RetryError, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

    attempts = Retrying(
        retry=retry_if_exception(retry_if or is_transient),
        stop=stop_after_delay(PATIENCE_S if patience_s is None else patience_s),
        wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=_LONGEST_WAIT_S),
        before_sleep=_warn,
    )
    try:
        return attempts(work)
    except RetryError as failure:
        last = failure.last_attempt.exception()
        assert last is not None
        raise RetriesExhaustedError(last, failure.last_attempt.attempt_number) from last


def is_transient(error: BaseException | None) -> bool:
    """Return whether the same request may succeed later: throttled, failed in the server, cut off, or timed out."""
    if error is None:
        return False
    code = answer_code(error)
    if code is not None:
        return code in _THROTTLE_CODES | _SERVER_CODES | _CONFLICT_CODES or _status(error) in _SERVER_STATUSES
    status = getattr(error, "status", None)
    if isinstance(status, int) or isinstance(error, ValueError):  # an answer over http; a name that no server has
        return status in _HTTP_STATUSES
    # Before the errno: some of the clients' classes are OSErrors too, without one.
    families = (kind for kind in type(error).__mro__ if kind.__module__.startswith(_CLIENT_PACKAGES))
    if any(kind.__name__ in _TRANSIENT_CLASSES for kind in families):
        return True
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS


def is_unreached(error: BaseException) -> bool:
    """Return whether the client of http had no connection to the server."""
    kinds = {kind.__name__ for each in (error, error.__cause__) for kind in type(each).__mro__}
    return bool(kinds & _UNREACHED_CLASSES)


def lacks_bucket(error: BaseException | None) -> bool:
    """Return whether the object store says that it has no such bucket."""
    return error is not None and answer_code(error) == "NoSuchBucket"


def was_not_done(error: BaseException) -> bool:
    """Return whether the server says that it refused the request and that a retry may help.

    Unlike a cut connection, after which it is not known.
    """
    return answer_code(error) in _THROTTLE_CODES | _CONFLICT_CODES


def answer_code(error: BaseException) -> str | None:
    """Return S3's name of the error, or the HTTP status as text; None without an answer."""
    code = _response(error).get("Error", {}).get("Code")
    return None if code is None else str(code)


def _warn(state: "RetryCallState") -> None:
    """Report the reason of a wait if a call takes noticeably long."""
    error, statistics = state.outcome.exception() if state.outcome is not None else None, state.retry_object.statistics
    if error is not None and (state.seconds_since_start or 0) > _WARN_AFTER_S and not statistics.get("reported"):
        statistics["reported"] = True
        _log.warning("storage: %s; trying again for up to %.0f s", str(error) or type(error).__name__, PATIENCE_S)


def _status(error: BaseException) -> int:
    return int(_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _response(error: BaseException) -> dict[str, dict[str, Any]]:
    """Return botocore's record of the answer: s3fs raises Python's own errors, with botocore's as their cause."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def reason_of(error: BaseException | None) -> str:
    """Return the message of an error in one line, or its class where it has none."""
    return without_passwords(one_line(str(error) or type(error).__name__))


def _client(protocol: str, place: str) -> Any:
    """Return fsspec's file system, one for each process, server and setting of the environment: making one is slow."""
    import fsspec

    settings = sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    server = place.partition("/")[0] if protocol == HDFS else ""
    options = {} if protocol in (*S3_PROTOCOLS, HDFS) else _options_in(protocol, place)
    key = (os.getpid(), protocol, server, *sorted(options.items()), *settings)
    with _clients_lock:
        if key not in _clients:
            try:
                if protocol in S3_PROTOCOLS:
                    check_endpoint()
                    _clients[key] = fsspec.filesystem(protocol, skip_instance_cache=True, **_S3_OPTIONS)
                    _clients[key].retries = 1
                elif protocol == HDFS:
                    _clients[key] = hdfs(server)
                elif protocol in HTTP_PROTOCOLS:
                    _clients[key] = fsspec.filesystem(protocol, client_kwargs=_http_limits())
                else:
                    _clients[key] = fsspec.filesystem(protocol, **options)
            except (TypeError, ValueError, ImportError) as error:  # TypeError: the client lacks a setting
                raise AddressError(Problem.CANNOT_OPEN, protocol, error) from error
        return _clients[key]


def _http_limits() -> dict[str, Any]:
    """Return the limits of a request of aiohttp: by default it waits for five minutes."""
    from aiohttp import ClientTimeout

    return {"timeout": ClientTimeout(total=PATIENCE_S, connect=HTTP_PATIENCE_S, sock_read=_HTTP_SILENCE_S)}


def _options_in(protocol: str, place: str) -> dict[str, Any]:
    """Return the options of fsspec's client for the server that an address names.

    Raises AddressError where there is no client of this protocol, or its package is missing.
    """
    import fsspec

    try:
        return dict(fsspec.get_filesystem_class(protocol)._get_kwargs_from_urls(f"{protocol}://{place}"))
    except (ValueError, ImportError) as error:
        raise AddressError(Problem.CANNOT_OPEN, protocol, error) from error


def _looks_before_it_creates(client: Any) -> bool:
    """Return whether a client's create is fsspec's own: it looks whether the file exists, and writes then."""
    from fsspec import AbstractFileSystem

    return getattr(client.pipe_file, "__func__", None) is AbstractFileSystem.pipe_file


def hdfs(server: str) -> Any:
    """Open HDFS by pyarrow's client, through fsspec. Raises OSError where Hadoop's library is not installed."""
    import fsspec

    host, _, port = server.partition(":")
    return fsspec.filesystem(HDFS, host=host, port=int(port or 0))


def _forget_clients() -> None:
    """Forget the parent's clients in the child of a fork: they do not work there, and locks may be held for ever."""
    global _clients_lock, _memory_lock
    _clients.clear()
    _clients_lock, _memory_lock = threading.Lock(), threading.Lock()


os.register_at_fork(after_in_child=_forget_clients)


def _entry(path: str, found: Mapping[str, Any]) -> StorageEntry:
    tag = found.get("ETag") or found.get("etag") or ""
    if found["size"] is None:
        raise StorageError(Problem.SIZE_UNKNOWN, found["name"])
    return StorageEntry(path, int(found["size"]), _time_of(found), str(tag).strip('"'))


def _time_of(found: Mapping[str, Any]) -> float:
    """Return when a file was written, which fsspec's clients say under different names."""
    if written := found.get("Last-Modified"):  # of http
        return parsedate_to_datetime(written).timestamp()
    names = ("LastModified", "last_modified", "mtime", "modified", "updated", "created")
    moment = next((found[name] for name in names if found.get(name) is not None), None)
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    if isinstance(moment, datetime):
        return moment.timestamp()
    if isinstance(moment, int | float):
        return float(moment)
    raise StorageError(Problem.TIME_UNKNOWN, found.get("name"))


S3_PROTOCOLS, HTTP_PROTOCOLS = ("s3", "s3a"), ("http", "https")
_S3 = re.compile(r"(s3a?):(?:/{1,2}([^/]*).*)?", re.IGNORECASE | re.DOTALL)  # pathlib makes one slash of two, or none


def check_address(address: str) -> None:
    """Raise AddressError where an address of S3 has no bucket (its variable was not set), or one of HDFS no server.

    Also where the scheme of S3 is in capital letters. No other address is looked at.
    """
    if address.startswith("hdfs:///"):
        path = address.removeprefix("hdfs:///")
        raise AddressError(Problem.ADDRESS_WITHOUT_SERVER, address, path)
    match = _S3.fullmatch(address)
    if match is None:
        return
    scheme, bucket = match[1], match[2]
    if not bucket:
        raise AddressError(Problem.ADDRESS_WITHOUT_BUCKET, address)
    if scheme not in S3_PROTOCOLS:
        raise AddressError(Problem.UNKNOWN_SCHEME, address, scheme, scheme.lower())


def leads_out(path: str) -> bool:
    """Return whether a path, relative to a place, has a part that may lead out of it, or that no file has: .., a NUL.

    "." and an absolute path are of these; "", the place itself, is not.
    """
    return path.startswith("/") or "\0" in path or any(part in (".", "..") for part in path.split("/"))


def check_below(path: str, place: str, writing: bool) -> None:
    """Raise StorageError where a path is not below its place; `writing`: where it is the place itself as well."""
    if leads_out(path) or (writing and not path):
        raise StorageError(Problem.NOT_BELOW, path, place, "changed" if writing else "read")
