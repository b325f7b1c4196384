"""The client of the feature server.

Letters of shapes: U keys asked, D feature width.
"""

import os
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import flight

from featurestore.errors import AccessError, DeadlineError, ServerError, UnavailableError
from featurestore.flight import protocol
from featurestore.format.codec import Codec
from featurestore.format.datafile import matrix_of, numpy_column
from featurestore.keys import AnyArray, BoolArray, Int64Array
from featurestore.lookup.hashedrows import Lookup
from featurestore.lookup.rowfiles import output_for
from featurestore.problems import Problem
from featurestore.spec import MissingPolicy
from featurestore.store import missing_keys

_CALL_BYTES = 256 << 20  # of features in one call: each has its deadline
_CALL_KEYS = 1 << 20
_ADDRESS = re.compile(r"grpc(\+tcp|\+tls)?://(\[[0-9A-Fa-f:.]+\]|[^\s/:]+):\d+/?")
# HTTP/2 lets a sender send 64 kB unasked. With more on the way, a client could wait to send for a server that waits to
# send: so a message goes out only while less than _AHEAD_KEYS have no answer, together 48 kB.
_MESSAGE_KEYS = 2_048
_AHEAD_KEYS = 2 * _MESSAGE_KEYS
# What a server may send ahead; it fills 1 Gbit/s at 60 ms. Left to itself, gRPC lets it grow, and answers lie in memory
# for so long that they have left the processor's cache: a tenth slower, and 200 MB more in the client.
_WINDOW: Any = [("grpc.http2.lookahead_bytes", 8 << 20), ("grpc.http2.bdp_probe", 0)]


def connect(
    address: str,
    *,
    token: str | None = None,
    ca: str | os.PathLike[str] | None = None,
    version: int | None = None,
    missing: MissingPolicy = "error",
    timeout_s: float = 60.0,
) -> "FeatureClient":
    """Connect to a feature server (`crossmedia store serve`): `grpc://HOST:PORT`, or `grpc+tls://` over TLS.

    `token` is one of the server's --token-file; `ca` a file of certificates to trust, by default those of the system.
    The newest snapshot that the server offers is opened, or that of `version`, and stays the same. `missing` is as of
    `FeaturePartition`. Every call has `timeout_s`; a lookup of more than 256 MB makes several. Raises UnavailableError,
    AccessError, DeadlineError, SnapshotNotFoundError.
    """
    if missing not in get_args(MissingPolicy):
        raise ValueError(Problem.UNKNOWN_POLICY.of(missing, ", ".join(get_args(MissingPolicy))))
    if timeout_s <= 0:
        raise ValueError(f"timeout_s={timeout_s} is not positive")
    if not _ADDRESS.fullmatch(address):
        raise ValueError(Problem.NOT_A_SERVER_ADDRESS.of(address))
    return FeatureClient(address, token, _read(ca), version, missing, timeout_s)


class FeatureClient:
    """The rows of one snapshot, looked up at a server. Lookups may run in several threads at once.

    The bits are those that `FeaturePartition` gives. A client keeps its snapshot; a server that no longer has it open
    opens it again, until it has expired (SnapshotNotFoundError).
    """

    def __init__(
        self,
        address: str,
        token: str | None,
        ca: str | None,
        version: int | None,
        missing: MissingPolicy,
        timeout_s: float,
    ) -> None:
        """Use `connect`."""
        self.address = address
        self._timeout_s, self._has_token = timeout_s, token is not None
        headers: Any = [] if token is None else [(protocol.TOKEN_HEADER.encode(), protocol.bearer(token))]
        self._options = flight.FlightCallOptions(timeout=timeout_s, headers=headers)
        self._client = flight.FlightClient(address, tls_root_certs=ca, generic_options=_WINDOW)
        try:
            action = flight.Action(protocol.DESCRIBE, protocol.Asked(version=version).model_dump_json().encode())
            with self._translated():
                (answer,) = self._client.do_action(action, self._options)
            described = protocol.parse_message(protocol.Described, answer.body.to_pybytes())
        except BaseException:
            self.close()
            raise
        self.info = described.info
        self.codec = Codec(self.info.dtype)
        self.snapshot_id = described.snapshot_id
        self.snapshot_version = self.snapshot_id.version
        self.num_rows = described.num_rows
        self.missing_policy, self.missing_count = missing, 0
        self._lock = threading.Lock()

    @property
    def dim(self) -> int:
        """Width of a feature."""
        return self.info.dim

    def lookup(self, keys_U: npt.ArrayLike, out: AnyArray | None = None) -> Lookup:
        """Return the features of `keys_U` in the order asked, written into `out` (U, D) where it is given.

        As `FeaturePartition.lookup`, also for keys without a feature. Raises UnavailableError, DeadlineError,
        AccessError, ServerError; then `out` may be filled in part.
        """
        asked_U = _keys(keys_U)
        out = output_for(self.info, len(asked_U), out)
        missing_U = self._ask(asked_U, out)
        if missing_U.any():
            self._note_missing(asked_U[missing_U])
        return Lookup(out, missing_U)

    def contains(self, keys_U: npt.ArrayLike) -> BoolArray:
        """Return which keys have a feature, (U,); none is sent. Raises what `lookup` raises of servers."""
        return ~self._ask(_keys(keys_U), None)

    def __enter__(self) -> "FeatureClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _ask(self, keys_U: Int64Array, out_UD: AnyArray | None) -> BoolArray:
        """Ask for keys, call by call, and return which are missing; without `out_UD` no features are sent."""
        missing_U = np.empty(len(keys_U), np.bool_)
        size = max(1, min(_CALL_KEYS, _CALL_BYTES // self.info.row_bytes))
        for start in range(0, len(keys_U), size):
            part = slice(start, start + size)
            self._exchange(keys_U[part], missing_U[part], None if out_UD is None else out_UD[part])
        return missing_U

    def _exchange(self, keys_U: Int64Array, missing_U: BoolArray, out_UD: AnyArray | None) -> None:
        """Send keys while answers come, and put these into `missing_U` and `out_UD`."""
        asked = protocol.Asked(version=self.snapshot_version, features=out_UD is not None).model_dump_json().encode()
        with self._translated():
            writer, reader = self._client.do_exchange(flight.FlightDescriptor.for_command(asked), self._options)
            try:
                writer.begin(protocol.KEYS_SCHEMA)
                sent = done = 0
                while done < len(keys_U):
                    while sent < len(keys_U) and sent - done < _AHEAD_KEYS:
                        message = pa.array(keys_U[sent : sent + _MESSAGE_KEYS])
                        writer.write_batch(pa.record_batch([message], schema=protocol.KEYS_SCHEMA))
                        sent = min(sent + _MESSAGE_KEYS, len(keys_U))
                    done += self._take(
                        reader.read_chunk().data, missing_U[done:], out_UD if out_UD is None else out_UD[done:]
                    )
            except (pa.ArrowException, OSError, StopIteration):
                writer.close()  # raises why the server ended the call
                raise
            except BaseException:
                reader.cancel()
                raise
            writer.close()

    def _take(self, batch: Any, missing_U: BoolArray, out_UD: AnyArray | None) -> int:
        """Copy an answer to the beginning of what is left; return how many rows it has."""
        table = pa.Table.from_batches([batch])
        missing_U[: len(table)] = ~numpy_column(table, protocol.FOUND)
        if out_UD is not None:
            out_UD[: len(table)] = matrix_of(table, self.info)
        return len(table)

    def _note_missing(self, keys_M: Int64Array) -> None:
        if self.missing_policy == "error":
            where = f"snapshot {self.snapshot_version} of {self.snapshot_id.url} at {self.address}"
            raise missing_keys(keys_M, where)
        with self._lock:
            self.missing_count += len(keys_M)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise errors of Flight as ours."""
        try:
            yield
        except StopIteration:
            raise ServerError(Problem.ANSWER_ENDED_EARLY, self.address) from None
        except (pa.ArrowException, OSError) as error:
            raise self._translation(error) from error

    def _translation(self, error: Exception) -> Exception:
        ours = protocol.error_received(error)
        if ours is not None:
            ours.add_note(f"(said by the feature server {self.address})")
            return ours
        reason = str(error).partition("\n")[0]
        if isinstance(error, flight.FlightTimedOutError):
            return DeadlineError(Problem.NO_ANSWER_IN_TIME, self.address, self._timeout_s)
        if isinstance(error, flight.FlightUnauthenticatedError | flight.FlightUnauthorizedError):
            return AccessError(Problem.TOKEN_REFUSED if self._has_token else Problem.TOKEN_NEEDED, self.address)
        # A server that ends cancels the calls that it has taken and not begun.
        if not isinstance(error, flight.FlightUnavailableError | flight.FlightCancelledError):
            return ServerError(Problem.SERVER_FAILED, self.address, reason)
        if "certificate" in reason:  # gRPC has no code for it
            return AccessError(Problem.CERTIFICATE_REFUSED, self.address, reason)
        return UnavailableError(Problem.NO_SERVER, self.address, reason)


def _keys(keys_U: npt.ArrayLike) -> Int64Array:
    given_U = np.asarray(keys_U)
    if given_U.size and given_U.dtype.kind not in "iu":  # 1.5 would ask for 1
        raise TypeError(Problem.KEYS_NOT_INT64.of(given_U.dtype))
    return np.ascontiguousarray(given_U, np.int64).reshape(-1)


def _read(ca: str | os.PathLike[str] | None) -> str | None:
    if ca is None:
        return None
    try:
        text = Path(ca).read_text()
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (OSError, ValueError) as error:  # an SSLError, of a text without a certificate, is an OSError
        if isinstance(error, ssl.SSLError | ValueError):
            raise AccessError(Problem.NOT_A_CERTIFICATE, os.fspath(ca)) from error
        raise AccessError(Problem.CANNOT_READ_CERTIFICATES, os.fspath(ca), error) from error
    return text
