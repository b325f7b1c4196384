"""The feature server over Arrow Flight: open snapshots, answers, tokens and TLS.

Letters of shapes: U keys asked, C of them in a block, D feature width.
"""

import hmac
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import flight

from featurestore.errors import FeatureStoreError, QueryError, ServerError, SnapshotNotFoundError
from featurestore.flight import protocol
from featurestore.keys import Int64Array
from featurestore.lookup.partition import FeaturePartition
from featurestore.problems import Problem
from featurestore.published.versions import VersionName
from featurestore.storage.storage import Progress
from featurestore.store import FeatureStore

BLOCK_BYTES = 4 << 20
MAX_OLDER = 3
_MASK_ROWS = 1 << 16
_SHUTDOWN_S = 20.0
_LINGER_S = 0.5
"""Seconds for a client to read the end of a written answer: a connection that is closed before may lose it."""


class OpenSnapshots:
    """Partitions of a store, one for each open snapshot. Any number of threads may ask at once.

    The newest one stays open, and up to MAX_OLDER others; the least recently used one is dropped for another, and is
    unmapped when the last call that uses it ends. With a `version` that one alone is offered, and it counts as the
    newest; with a channel the snapshot that it points to does.
    """

    def __init__(
        self,
        store: FeatureStore,
        *,
        version: VersionName | None = None,
        cache_dir: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.store = store
        self._version, self._cache_dir = version, cache_dir
        self._lock = threading.Lock()  # held while one of the older ones is opened
        self._older: dict[int, FeaturePartition] = {}  # the least recently used first
        self._newest = self._load(store.snapshot(version).version, progress)

    @property
    def newest(self) -> int:
        """Version of the snapshot that is offered by default."""
        return self._newest.snapshot_version

    def partition(self, version: int | None) -> FeaturePartition:
        """Return the partition of a snapshot, by default of the newest; opened first where it is not.

        Raises SnapshotNotFoundError, CorruptFileError, StorageError.
        """
        newest = self._newest
        if version is None or version == newest.snapshot_version:
            return newest
        if isinstance(self._version, int):
            raise SnapshotNotFoundError(Problem.ONE_SNAPSHOT_OFFERED, self.newest, self.store.url)
        with self._lock:
            found = self._older.get(version)
            return self._keep(self._load(version) if found is None else found)

    def follow(self) -> bool:
        """Open the newest snapshot of the store, or the channel's, and offer it; return whether it is another one.

        Without a channel a snapshot is opened where it is newer; with one, where the channel was moved. Raises what
        opening raises; the one before stays the newest.
        """
        before, version = self._newest, self.store.snapshot(self._version).version
        if version == before.snapshot_version or (version < before.snapshot_version and self._version is None):
            return False
        opened = self.partition(version)
        with self._lock:
            self._newest = opened
            self._older.pop(version, None)
            self._keep(before)
        return True

    def _keep(self, partition: FeaturePartition) -> FeaturePartition:
        """Note that an older one is used, and drop the least recently used of too many. The lock is held."""
        self._older.pop(partition.snapshot_version, None)
        self._older[partition.snapshot_version] = partition
        for version in list(self._older)[:-MAX_OLDER]:
            del self._older[version]
        return partition

    def _load(self, version: int, progress: Progress | None = None) -> FeaturePartition:
        return FeaturePartition.load(
            self.store, cache_dir=self._cache_dir, missing="zeros", version=version, progress=progress
        )


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Address, tokens and certificate of a server."""

    host: str = "127.0.0.1"
    port: int = 0  # 0: a free one
    tls: tuple[str, str] | None = None  # certificate and key, PEM
    tokens: Sequence[str] = ()  # none: everybody may ask


class TokenCheck(flight.ServerMiddlewareFactory):
    """Refuses every call without one of the tokens."""

    def __init__(self, tokens: Sequence[str]) -> None:
        super().__init__()
        self._tokens = [protocol.bearer(token) for token in tokens]

    def start_call(self, _info: Any, headers: Mapping[str, Sequence[str | bytes]]) -> None:
        """Let the call continue, or raise FlightUnauthenticatedError."""
        given = next(
            (value for name, values in headers.items() if name.lower() == protocol.TOKEN_HEADER for value in values), ""
        )
        sent = given if isinstance(given, bytes) else given.encode()
        # All are compared, each in a time that does not depend on what is in it.
        if not sum(hmac.compare_digest(sent, token) for token in self._tokens):
            raise flight.FlightUnauthenticatedError("no token, or one that this server does not know")


class FeatureServer(flight.FlightServerBase):
    """Answers as soon as it is made. Each call has a thread of its own."""

    def __init__(self, snapshots: OpenSnapshots, listening: Listening) -> None:
        scheme = protocol.SECURE if listening.tls else "grpc"
        host = f"[{listening.host}]" if ":" in listening.host else listening.host
        self._snapshots = snapshots
        self._calls, self._running, self._drains = threading.Condition(), 0, False
        super().__init__(
            f"{scheme}://{host}:{listening.port}",
            tls_certificates=[listening.tls] if listening.tls else None,
            middleware={"token": TokenCheck(listening.tokens)} if listening.tokens else None,
        )
        self.address = f"{scheme}://{host}:{self.port}"

    def do_exchange(self, _context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Answer batches of keys with features, in the order asked. The command is an `Asked`.

        Each batch of keys is answered by as many rows, in one batch or several.
        """
        with self._answering():
            asked = protocol.parse_message(protocol.Asked, descriptor.command)
            partition = self._snapshots.partition(asked.version)
            block_rows = max(1, BLOCK_BYTES // partition.info.row_bytes) if asked.features else _MASK_ROWS
            writer.begin(protocol.answer_schema(partition.info, asked.features))
            for chunk in reader:
                keys_U = protocol.keys_of(chunk.data)
                for start in range(0, len(keys_U), block_rows):
                    writer.write_batch(_answer(partition, keys_U[start : start + block_rows], asked.features))

    def do_action(self, _context: Any, action: Any) -> Iterator[bytes]:
        """Describe a snapshot: a `Described` as JSON."""
        with self._answering():
            if action.type != protocol.DESCRIBE:
                raise QueryError(Problem.UNKNOWN_ACTION, action.type, protocol.DESCRIBE)
            asked = protocol.parse_message(protocol.Asked, action.body.to_pybytes() if action.body else b"")
            partition = self._snapshots.partition(asked.version)
            described = protocol.Described(
                info=partition.info, snapshot_id=partition.snapshot_id, num_rows=partition.num_rows
            )
            return iter([described.model_dump_json().encode()])

    def drain(self, timeout_s: float) -> bool:
        """Refuse new calls, and wait for those that run; return whether they have ended in time."""
        with self._calls:
            self._drains = True
            return self._calls.wait_for(lambda: not self._running, timeout_s)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Count a call, and send errors of ours as such; of others clients learn that there was one, stderr more."""
        with self._calls:
            if self._drains:
                raise flight.FlightUnavailableError("the server shuts down")
            self._running += 1
        try:
            yield
        except FeatureStoreError as error:
            raise protocol.error_sent(error) from error
        except flight.FlightError:
            raise
        except (pa.ArrowException, OSError) as error:  # the client went away, or it is a failure of Flight itself
            raise flight.FlightInternalError(f"{type(error).__name__}") from error
        except Exception as error:
            sys.stderr.write(traceback.format_exc())
            raise flight.FlightInternalError(f"the server failed: {type(error).__name__}") from error
        finally:
            with self._calls:
                self._running -= 1
                self._calls.notify_all()


def _answer(partition: FeaturePartition, keys_C: Int64Array, features: bool) -> pa.RecordBatch:
    """Make the answer to a block of keys, in memory of its own, as Flight sends it later."""
    schema = protocol.answer_schema(partition.info, features)
    if not features:
        return pa.record_batch([pa.array(partition.contains(keys_C))], schema=schema)
    info = partition.info
    memory = pa.allocate_buffer(len(keys_C) * info.row_bytes)
    out_CD = np.frombuffer(memoryview(memory), info.storage_dtype).reshape(-1, info.dim)
    missing_C = partition.lookup(keys_C, out=out_CD).missing_U
    feature = pa.FixedSizeBinaryArray.from_buffers(pa.binary(info.row_bytes), len(keys_C), [None, memory])
    return pa.record_batch([pa.array(~missing_C), feature], schema=schema)


def serve(snapshots: OpenSnapshots, listening: Listening, poll_s: float, report: Callable[[str], None]) -> None:
    """Serve snapshots until SIGTERM or Ctrl-C. For the main thread.

    Looks for a newer snapshot every `poll_s` seconds. `report` gets a line when the server answers, and one for every
    newer snapshot. Raises ServerError where it cannot listen at the address.
    """
    ended = threading.Event()
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    # Whichever thread a signal meets writes there; the wait for a lock would not end if it met another one, or came
    # just before.
    signal.set_wakeup_fd(wakes.fileno())
    try:
        server = FeatureServer(snapshots, listening)
    except (pa.ArrowException, OSError) as error:
        raise ServerError(Problem.CANNOT_LISTEN, listening.host, listening.port, error) from error
    threading.Thread(target=follow, args=(snapshots, poll_s, report, ended), name="follow", daemon=True).start()
    try:
        report(f"{server.address} offers snapshot {snapshots.newest} of {snapshots.store.url}")
        woken.recv(1)  # Ctrl-C raises KeyboardInterrupt
    finally:
        signal.set_wakeup_fd(-1)
        ended.set()
        _shut_down(server)


def follow(snapshots: OpenSnapshots, poll_s: float, report: Callable[[str], None], ended: threading.Event) -> None:
    """Look for a newer snapshot every `poll_s` seconds until `ended` is set. Reports each thing once."""
    last = ""
    while not ended.wait(poll_s):
        line = last
        try:
            if snapshots.follow():
                line = f"offers snapshot {snapshots.newest}"
        except FeatureStoreError as error:
            line = f"stays at snapshot {snapshots.newest}: {error}"
        if line != last:
            last = line
            report(line)


def _shut_down(server: FeatureServer) -> None:
    """Refuse new calls and wait for those that run; a client that does not read its answer ends with the process."""
    if not server.drain(_SHUTDOWN_S):
        sys.stdout.flush()
        os._exit(0)
    time.sleep(_LINGER_S)
    server.shutdown()
