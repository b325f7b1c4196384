"""The client of the feature service.

Letters of shapes: U keys asked, D feature width.

Letters of shapes: U keys asked, S shards, D feature width.
"""

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_args
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import flight

from featurestore.errors import (
    AccessError,
    AnotherStoreError,
    DeadlineError,
    MissingKeysError,
    ServerError,
    UnavailableError,
)
from featurestore.flight.protocol import (
    DESCRIBE,
    FOUND,
    KEYS_SCHEMA,
    SCHEMES,
    SECURE,
    Asked,
    Described,
    error_received,
    keys_batch,
    parsed,
)
from featurestore.flight.server import bearer
from featurestore.format.codec import Codec
from featurestore.format.datafile import matrix_of, numpy_column
from featurestore.keys import Int64Array, shard_of
from featurestore.lookup.partition import Lookup, output_for
from featurestore.snapshot import missing_message
from featurestore.spec import MissingPolicy, StoreInfo
from featurestore.text import DType

_KEYS_AT_ONCE = 4_096  # half of what HTTP/2 lets a sender send unasked
_KEYS_PER_MESSAGE = 1 << 14
_PROBE_S = 5.0
_NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "UNEXPECTED_MESSAGE")
"""What OpenSSL calls an answer that is none of TLS; it differs between versions."""
_LARGEST_COUNTED = (32 << 20) - (8 << 10)
# What a server may send ahead; it fills 1 Gbit/s at 60 ms. Left to itself, gRPC lets it grow, and answers lie in memory
# for so long that they have left the processor's cache: a tenth slower, and 200 MB more in the client.
_WINDOW: Any = [("grpc.http2.lookahead_bytes", 8 << 20), ("grpc.http2.bdp_probe", 0)]


class ServerLink:
    """One server, asked by any number of threads. Every request has `timeout_s` to its end."""

    def __init__(self, address: str, token: str | None, ca: str | None, timeout_s: float) -> None:
        self.address = address
        self._timeout_s, self._ca, self._has_token = timeout_s, ca, token is not None
        _keep_freed_memory()
        headers: Any = [] if token is None else [bearer(token)]
        self._options = flight.FlightCallOptions(timeout=timeout_s, headers=headers)
        self._client = flight.FlightClient(address, tls_root_certs=ca, generic_options=_WINDOW)

    def describe(self, version: int | None) -> Described:
        """Ask for a snapshot, the newest by default: what the server has of it."""
        action = flight.Action(DESCRIBE, Asked(version=version).model_dump_json().encode())
        with self._translated():
            (described,) = (each.body.to_pybytes() for each in self._client.do_action(action, self._options))
        return parsed(Described, described)

    def exchange(self, version: int, keys_U: Int64Array, out: "Answer", features: bool = True) -> None:
        """Ask for keys of a snapshot, and put what comes into `out`; `features`: false asks which are there alone."""
        asked = Asked(version=version, features=features).model_dump_json().encode()
        descriptor = flight.FlightDescriptor.for_command(asked)
        with self._translated():
            writer, reader = self._client.do_exchange(descriptor, self._options)
            try:
                with _sending(writer, reader, keys_U):
                    done = 0
                    while done < len(keys_U):
                        done += out.put(done, reader.read_chunk().data)
                writer.close()
            except BaseException:
                reader.cancel()
                with contextlib.suppress(pa.ArrowException, OSError):
                    writer.close()
                raise

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except StopIteration:
            raise ServerError(f"{self.address} ended its answer too early") from None
        except (pa.ArrowException, OSError) as error:
            raise self._translation(error) from error

    def _translation(self, error: Exception) -> ServerError | Exception:
        ours = error_received(error)
        if ours is not None:
            ours.add_note(f"(said by the feature server {self.address})")
            return ours
        first = str(error).partition("\n")[0]
        if isinstance(error, flight.FlightTimedOutError):
            return DeadlineError(f"{self.address} did not answer within timeout_s={self._timeout_s:g}")
        if isinstance(error, flight.FlightUnauthenticatedError | flight.FlightUnauthorizedError):
            refused = "refuses the token: it must be" if self._has_token else "needs a token: connect(..., token=...),"
            return AccessError(f"{self.address} {refused} one of the server's --token-file")
        if isinstance(error, flight.FlightUnavailableError):
            return tls_error(self.address, self._ca) or UnavailableError(
                f"no feature server answers at {self.address}, or the connection broke: {first}"
            )
        return ServerError(f"{self.address} failed: {first}")


@contextmanager
def _sending(writer: Any, reader: Any, keys_U: Int64Array) -> Iterator[None]:
    """Send keys while the block reads answers: one message at once, more of them in a thread.

    HTTP/2 lets a sender send 64 kB unasked. With more, a client could wait to send for a server that waits to send.
    """
    if len(keys_U) <= _KEYS_AT_ONCE:
        try:
            _send(writer, keys_U)
        except (pa.ArrowException, OSError):
            writer.close()  # says why
            raise
        yield
        return

    def send() -> None:
        with contextlib.suppress(pa.ArrowException, OSError):  # the reader learns what it is
            _send(writer, keys_U)

    thread = threading.Thread(target=send, name="keys", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        reader.cancel()  # so that the thread does not wait for the server
        raise
    finally:
        thread.join()


def _send(writer: Any, keys_U: Int64Array) -> None:
    writer.begin(KEYS_SCHEMA)
    for start in range(0, len(keys_U), _KEYS_PER_MESSAGE):
        writer.write_batch(keys_batch(keys_U[start : start + _KEYS_PER_MESSAGE]))
    writer.done_writing()


class Answer:
    """Where the answers to some keys go: rows of a matrix, and of a mask of what is missing.

    Several threads may put parts of one answer, as each has rows of its own.
    """

    def __init__(
        self,
        info: StoreInfo,
        out_UD: npt.NDArray[Any] | None,
        missing_U: npt.NDArray[np.bool_],
        rows: slice | Int64Array,
    ) -> None:
        """`rows` are those of the keys asked, a stretch or any; without `out_UD` there are no features."""
        self._info, self._out_UD, self._missing_U, self._rows = info, out_UD, missing_U, rows

    def put(self, first: int, batch: Any) -> int:
        """Put the answer to the keys from number `first` on; return how many those are."""
        table = pa.Table.from_batches([batch])
        block = slice(first, first + len(table))
        rows = self._rows
        place: slice | Int64Array = (
            slice(rows.start + block.start, rows.start + block.stop) if isinstance(rows, slice) else rows[block]
        )
        self._missing_U[place] = ~numpy_column(table, FOUND)
        if self._out_UD is not None:
            self._out_UD[place] = matrix_of(table, self._info)
        return len(table)


def _keep_freed_memory() -> None:
    """Let this process keep up to 64 MB that it frees, so that the memory of one answer serves the next one.

    Until glibc has seen a large block freed, it gives memory back to the kernel again and again, and bulk lookups take
    almost twice as long (67 instead of 36 ms for 67 MB). mallopt(3) describes it at M_MMAP_THRESHOLD. The block here is
    the largest that counts, and is never touched.
    """
    np.empty(_LARGEST_COUNTED, np.uint8)


def tls_error(address: str, ca: str | None) -> ServerError | None:
    """Find out whether it is TLS that ends all connections; None where it is not.

    It may be a certificate, or that only one side speaks TLS. gRPC says no more than that there is no connection.
    """
    parts = urlsplit(address)
    is_secure = parts.scheme == SECURE
    context = ssl.create_default_context(cadata=ca)
    context.set_alpn_protocols(["h2"])
    if not is_secure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((parts.hostname or "", parts.port or 0), _PROBE_S) as plain,
            context.wrap_socket(plain, server_hostname=parts.hostname),
        ):
            return (
                None if is_secure else ServerError(f"{address} answers by TLS alone: write {SECURE}://{parts.netloc}")
            )
    except ssl.SSLCertVerificationError as error:
        return AccessError(f"{address}: its certificate is refused, {error.verify_message}; see ca=")
    except ssl.SSLError as error:
        if not is_secure or error.reason not in _NOT_TLS:
            return None
        return ServerError(
            f"{address} answers without TLS: write grpc://{parts.netloc}, or start the server with --tls-cert"
        )
    except (OSError, ValueError):
        return None


_CALL_BYTES = 256 << 20  # of features in one call: each has its deadline
_CALL_KEYS = 1 << 20


def connect(
    address: str,
    *,
    token: str | None = None,
    ca: str | os.PathLike[str] | None = None,
    version: int | None = None,
    missing: MissingPolicy = "error",
    timeout_s: float = 60.0,
) -> "FeatureClient":
    """Connect to feature servers (`python -m featurestore serve`): `grpc://HOST:PORT`, or with `grpc+tls://` over TLS.

    Several servers that share the shards of a store are written one after the other, with commas: the scheme once, or
    each with its own. `token` is one of the server's --token-file; `ca` a file of certificates to trust, by default
    those of the system. The newest snapshot that all of them offer is opened, or that of `version`, and stays the same.
    `missing` is as of `FeaturePartition`. Every call to a server has `timeout_s`; a lookup of more than 256 MB makes
    several. Raises UnavailableError, AccessError, DeadlineError, SnapshotNotFoundError; AnotherStoreError where servers
    have different stores, ServerError where together they lack a shard.
    """
    if missing not in get_args(MissingPolicy):
        raise ValueError(f"missing={missing!r} is none of {', '.join(get_args(MissingPolicy))}")
    if timeout_s <= 0:
        raise ValueError(f"timeout_s={timeout_s} is not positive")
    links = [ServerLink(each, token, _read(ca), timeout_s) for each in addresses(address)]
    try:
        return FeatureClient(links, version, missing)
    except BaseException:
        for link in links:
            link.close()
        raise


def addresses(text: str) -> list[str]:
    """Return the addresses in a text, each with its scheme. Raises ValueError naming the one that is none."""
    found: list[str] = []
    for each in text.split(","):
        scheme = urlsplit(found[-1]).scheme if found and "://" not in each else ""
        found.append(f"{scheme}://{each}" if scheme else each)
        parts = urlsplit(found[-1])
        try:
            complete = bool(parts.hostname and parts.port)
        except ValueError:
            complete = False
        if parts.scheme not in SCHEMES or not complete or parts.path not in ("", "/"):
            raise ValueError(f"{each!r} is no address of a feature server: grpc://HOST:PORT or grpc+tls://HOST:PORT")
    return found


class FeatureClient:
    """The rows of one snapshot, looked up at servers. Lookups may run in several threads at once.

    The bits are those that `FeaturePartition` gives. A client keeps its snapshot; a server that no longer has it open
    opens it again, until it has expired (SnapshotNotFoundError).
    """

    def __init__(self, links: Sequence[ServerLink], version: int | None, missing: MissingPolicy) -> None:
        """Use `connect`."""
        self._links = links
        self._pool = ThreadPoolExecutor(len(links), thread_name_prefix="features")
        described = self._describe(version)
        first = described[0]
        self.info = first.info
        self.codec = Codec(first.info.dtype)
        self.snapshot_id = first.snapshot_id
        self.snapshot_version = first.snapshot_id.version
        self.num_rows = 0
        self.missing_policy, self.missing_count = missing, 0
        self._lock = threading.Lock()
        self._link_S = np.full(self.info.num_shards, -1, np.int64)  # which server has a shard
        for number, each in enumerate(described):
            self._add(number, each)
        lacking = np.flatnonzero(self._link_S < 0)
        if len(lacking):
            raise ServerError(
                f"{self._names} lack {len(lacking)} of {self.info.num_shards} shards, the first is {lacking[0]}:"
                " name the servers that have them too"
            )

    @property
    def dim(self) -> int:
        """Width of a feature."""
        return self.info.dim

    @property
    def dtype(self) -> DType:
        """The store's dtype; bfloat16 rows come as their bits in uint16."""
        return self.info.dtype

    def lookup(self, keys_U: npt.ArrayLike, out: npt.NDArray[Any] | None = None) -> Lookup:
        """Return the features of `keys_U` in the order asked, written into `out` (U, D) where it is given.

        As `FeaturePartition.lookup`, which says what happens to a key without a feature. Raises UnavailableError,
        DeadlineError, AccessError, ServerError; then `out` may be filled in part.
        """
        asked_U = _keys(keys_U)
        out = output_for(self.info, len(asked_U), out)
        missing_U = self._ask(asked_U, out)
        if missing_U.any():
            self._note_missing(asked_U[missing_U])
        return Lookup(out, missing_U)

    def contains(self, keys_U: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return which keys have a feature, (U,); none is sent. Raises what `lookup` raises of servers."""
        return ~self._ask(_keys(keys_U), None)

    def __enter__(self) -> "FeatureClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown()
        for link in self._links:
            link.close()

    @property
    def _names(self) -> str:
        return ", ".join(link.address for link in self._links)

    def _describe(self, version: int | None) -> list[Described]:
        """Ask every server for the snapshot: by default the newest one that all of them offer."""
        described = list(self._pool.map(lambda link: link.describe(version), self._links))
        versions = {each.snapshot_id.version for each in described}
        if len(versions) > 1:
            oldest = min(versions)
            described = list(self._pool.map(lambda link: link.describe(oldest), self._links))
        return described

    def _add(self, number: int, described: Described) -> None:
        """Take in what one server has. Raises AnotherStoreError, or ServerError where another one has it too."""
        found, mine = described.snapshot_id, self.snapshot_id
        ids = [(each.store_id, each.commit_id, each.version) for each in (found, mine)]
        if ids[0] != ids[1] or described.info.kind != self.info.kind:
            first, other = self._links[0].address, self._links[number].address
            raise AnotherStoreError(
                f"{first} has {mine.described()}, but {other} has {found.described()}: servers must share one store"
            )
        shards = np.asarray(described.shards, np.int64)
        taken = shards[self._link_S[shards] >= 0]
        if len(taken):
            first, other = self._links[self._link_S[taken[0]]].address, self._links[number].address
            raise ServerError(f"{first} and {other} both have {len(taken)} shards, as {taken[0]}: name one of them")
        self._link_S[shards] = number
        self.num_rows += described.num_rows

    def _ask(self, keys_U: Int64Array, out_UD: npt.NDArray[Any] | None) -> npt.NDArray[np.bool_]:
        """Ask every server for its keys, all at once; return which are missing."""
        missing_U = np.empty(len(keys_U), np.bool_)

        def ask(call: _CallPart) -> None:
            answer = Answer(self.info, out_UD, missing_U, call.rows)
            call.link.exchange(self.snapshot_version, call.keys, answer, features=out_UD is not None)

        calls = self._calls(keys_U)
        if len(calls) == 1:
            ask(calls[0])
            return missing_U
        futures = [self._pool.submit(ask, call) for call in calls]
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            future.cancel()
        wait(futures)  # nothing writes into `out` any more when an error is raised
        for future in futures:
            if not future.cancelled():
                future.result()
        return missing_U

    def _calls(self, keys_U: Int64Array) -> list["_CallPart"]:
        """Cut a lookup into calls, each of one server and within the limit of a call."""
        size = max(1, min(_CALL_KEYS, _CALL_BYTES // self.info.row_bytes))
        if len(self._links) == 1:
            spans = [slice(start, start + size) for start in range(0, len(keys_U), size)]
            return [_CallPart(self._links[0], keys_U[span], span) for span in spans]
        link_U = self._link_S[shard_of(keys_U, self.info.num_shards)]
        calls = []
        for number, link in enumerate(self._links):
            rows = np.flatnonzero(link_U == number)
            parts = [rows[start : start + size] for start in range(0, len(rows), size)]
            calls += [_CallPart(link, keys_U[part], part) for part in parts]
        return calls

    def _note_missing(self, missing_keys: Int64Array) -> None:
        if self.missing_policy == "error":
            where = f"snapshot {self.snapshot_version} of {self.snapshot_id.url} at {self._names}"
            raise MissingKeysError(missing_message(missing_keys, where))
        with self._lock:
            self.missing_count += len(missing_keys)


class _CallPart(NamedTuple):
    """The keys of one call to one server, and their rows in the lookup."""

    link: ServerLink
    keys: Int64Array
    rows: slice | Int64Array


def _keys(keys_U: npt.ArrayLike) -> Int64Array:
    given_U = np.asarray(keys_U)
    if given_U.ndim > 1:
        raise ValueError(f"keys have shape {given_U.shape}, and have to be one list")
    if given_U.dtype.kind in "US":
        raise TypeError("keys are texts, and have to be whole numbers (int64): featurestore.keys_of_uris makes them")
    if given_U.size and given_U.dtype.kind == "f":  # 1.5 would ask for 1, and 2**60 as a float for a key next to it
        raise TypeError(f"keys are {given_U.dtype}, and have to be whole numbers (int64)")
    return np.ascontiguousarray(np.array(keys_U, dtype=np.int64, ndmin=1, copy=None))


def _read(ca: str | os.PathLike[str] | None) -> str | None:
    if ca is None:
        return None
    try:
        text = Path(ca).read_text()
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (OSError, ValueError) as error:  # what is no certificate is an SSLError, which is an OSError
        reason = "it has no certificate in PEM" if isinstance(error, ssl.SSLError | ValueError) else str(error)
        raise AccessError(f"cannot read the certificates ca={os.fspath(ca)}: {reason}") from error
    return text
