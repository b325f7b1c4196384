"""The connection of a client to one server: requests and answers, and what can go wrong on the way as errors of ours.

Letters of shapes: U keys asked, D feature width.
"""

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import flight

from featurestore.errors import AccessError, DeadlineError, ServerError, UnavailableError
from featurestore.flight.access import bearer
from featurestore.flight.protocol import (
    DESCRIBE,
    FOUND,
    KEYS_SCHEMA,
    SECURE,
    Asked,
    Described,
    error_received,
    keys_batch,
    parsed,
)
from featurestore.format.datafile import matrix_of, numpy_column
from featurestore.keys import Int64Array
from featurestore.spec import StoreInfo

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

    def describe(self, version: int | None) -> tuple[Described, bytes]:
        """Ask for a snapshot, the newest by default: what the server has of it, and the ranges of an int8 store."""
        action = flight.Action(DESCRIBE, Asked(version=version).model_dump_json().encode())
        with self._translated():
            described, ranges = (each.body.to_pybytes() for each in self._client.do_action(action, self._options))
        return parsed(Described, described), ranges

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
