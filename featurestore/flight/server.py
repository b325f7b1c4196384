"""The feature service over Arrow Flight: server, limits, open snapshots and access.

Flight has neither in Python: a write to a client that does not read waits for ever, and nothing there can end it. So
the connection of such a client is shut down below Flight, at its socket.

Letters of shapes: U keys asked, C of them in a block, D feature width.
"""

import contextlib
import hmac
import os
import re
import signal
import socket
import ssl
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
from pyarrow import flight

from featurestore import log
from featurestore.errors import FeatureStoreError, QueryError, ServerError, SnapshotNotFoundError, UnavailableError
from featurestore.flight.protocol import (
    DESCRIBE,
    SECURE,
    Asked,
    Described,
    ScanTicket,
    answer_schema,
    errors_sent,
    keys_of,
    parsed,
)
from featurestore.format.shard import live_schema
from featurestore.keys import Int64Array
from featurestore.lookup.partition import FeaturePartition
from featurestore.published.channels import VersionName
from featurestore.storage.threads import Progress
from featurestore.store import FeatureStore

_LOOKS = 4  # within the time that a client is waited for


class Call:
    """One call that is being answered."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self._waits_since_s: float | None = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Note that the block waits for the client."""
        self._waits_since_s = time.monotonic()
        try:
            yield
        finally:
            self._waits_since_s = None

    def is_stuck(self, limit_s: float) -> bool:
        """Return whether the client has been waited for longer than that."""
        since_s = self._waits_since_s
        return since_s is not None and time.monotonic() - since_s > limit_s


class CallLimits:
    """Lets up to `max_calls` be answered at once, and disconnects clients that are waited for longer than `stuck_s`."""

    def __init__(self, max_calls: int, stuck_s: float) -> None:
        self.max_calls, self.stuck_s = max_calls, stuck_s
        self._changed = threading.Condition()
        self._calls: set[Call] = set()
        self._draining = False
        threading.Thread(target=self._watch, name="stuck", daemon=True).start()

    def begin(self, peer: str) -> Call:
        """Count one call more. Raises UnavailableError over the limit, and when the server is about to end."""
        with self._changed:
            if self._draining:
                raise UnavailableError("this server is about to end: try again, or ask another one")
            if len(self._calls) >= self.max_calls:
                raise UnavailableError(
                    f"this server answers {self.max_calls} calls at once, and has as many now: try again,"
                    " or start it with a higher --max-calls"
                )
            call = Call(peer)
            self._calls.add(call)
            return call

    def end(self, call: Call) -> None:
        """Count the call no more; again is no error."""
        with self._changed:
            self._calls.discard(call)
            self._changed.notify_all()

    @contextlib.contextmanager
    def call(self, peer: str) -> Iterator[Call]:
        """Count a call for the time of a block."""
        call = self.begin(peer)
        try:
            yield call
        finally:
            self.end(call)

    def drain(self, limit_s: float) -> int:
        """Refuse new calls, and wait for those that run; return how many had to be disconnected after the limit."""
        with self._changed:
            self._draining = True
            self._changed.wait_for(lambda: not self._calls, limit_s)
            left = list(self._calls)
        for call in left:
            disconnect(call.peer)
        return len(left)

    def _watch(self) -> None:
        while True:
            time.sleep(self.stuck_s / _LOOKS)
            with self._changed:
                stuck = {call.peer for call in self._calls if call.is_stuck(self.stuck_s)}
            for peer in stuck:
                disconnect(peer)


def disconnect(peer: str) -> None:
    """Shut down this process's connection to a client, as gRPC names it: `ipv4:127.0.0.1:4711`. None is no error."""
    family, _, address = unquote(peer).partition(":")
    host, _, port = address.rpartition(":")
    wanted = (host.strip("[]"), port)
    if not family.startswith("ip"):
        return
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile, or not connected
            if not str(link.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(link.name))) as found:
                host, port = map(str, found.getpeername()[:2])
                if (host.removeprefix("::ffff:"), port) == wanted:
                    found.shutdown(socket.SHUT_RDWR)


MAX_OPEN = 4
KEEP_S = 600.0


@dataclass
class _Opened:
    lock: threading.Lock = field(default_factory=threading.Lock)  # held while it is opened
    partition: FeaturePartition | None = None
    users: int = 0
    used_s: float = field(default_factory=time.monotonic)


class OpenSnapshots:
    """Partitions of some shards, one for each open snapshot. Any number of threads may ask at once.

    Up to `max_open` are open together; what nobody used for `keep_s` is let go, except the newest. With a `version`
    that one alone is offered, and it counts as the newest; with a channel the snapshot that it points to does.
    """

    def __init__(
        self,
        store: FeatureStore,
        shards: Sequence[int],
        *,
        version: VersionName | None = None,
        cache_dir: Path | None = None,
        progress: Progress | None = None,
        max_open: int = MAX_OPEN,
        keep_s: float = KEEP_S,
    ) -> None:
        self.store, self.shards, self.fixed = store, tuple(shards), isinstance(version, int)
        self._channel = version if isinstance(version, str) else None
        self._progress = progress  # of the first one, which may have to be built
        self._cache_dir, self._max_open, self._keep_s = cache_dir, max_open, keep_s
        self._lock = threading.Lock()
        self._opened: dict[int, _Opened] = {}
        self.newest = store.snapshot(version).version
        with self.use(None):
            self._progress = None

    @contextmanager
    def use(self, version: int | None) -> Iterator[FeaturePartition]:
        """Lend the partition of a snapshot, by default of the newest; opened first where it is not.

        Raises SnapshotNotFoundError, CorruptFileError, StorageError; UnavailableError where too many others are used.
        """
        wanted = self._offered(version)
        opened = self._taken(wanted)
        try:
            with opened.lock:
                if opened.partition is None:
                    opened.partition = FeaturePartition.load(
                        self.store,
                        cache_dir=self._cache_dir,
                        missing="zeros",
                        version=wanted,
                        progress=self._progress,
                        shards=self.shards,
                    )
            yield opened.partition
        finally:
            with self._lock:
                opened.users -= 1
                opened.used_s = time.monotonic()
                if opened.partition is None and opened.users == 0:  # it could not be opened
                    self._opened.pop(wanted, None)

    def follow(self) -> bool:
        """Open the newest snapshot of the store, or the channel's, and offer it; return whether it is another one.

        Without a channel a snapshot is opened where it is newer; with one, where the channel was moved. Raises what
        opening raises; the one before stays the newest.
        """
        newest = self.newest if self.fixed else self.store.snapshot(self._channel).version
        if newest > self.newest or (self._channel is not None and newest != self.newest):
            with self.use(newest):
                self.newest = newest
            return True
        return False

    def let_go(self) -> None:
        """Close what nobody has used for a while, except the newest."""
        with self._lock:
            before_s = time.monotonic() - self._keep_s
            self._close([version for version in self._idle() if self._opened[version].used_s <= before_s])

    @property
    def versions(self) -> list[int]:
        """The snapshots that are open, ascending."""
        with self._lock:
            return sorted(self._opened)

    def close(self) -> None:
        """Close all that nobody uses."""
        with self._lock:
            self._close([version for version, opened in self._opened.items() if opened.users == 0])

    def _offered(self, version: int | None) -> int:
        if version is not None and self.fixed and version != self.newest:
            raise SnapshotNotFoundError(f"this server offers snapshot {self.newest} of {self.store.url} alone")
        return self.newest if version is None else version

    def _taken(self, version: int) -> _Opened:
        with self._lock:
            if version not in self._opened:
                excess = len(self._opened) + 1 - self._max_open
                if excess > 0:
                    self._close(self._idle()[:excess])
                if len(self._opened) >= self._max_open:
                    raise UnavailableError(f"{len(self._opened)} other snapshots are in use here: try again later")
                self._opened[version] = _Opened()
            self._opened[version].users += 1
            return self._opened[version]

    def _idle(self) -> list[int]:
        """List what nobody uses, the longest unused first; never the newest."""
        idle = [version for version, each in self._opened.items() if each.users == 0 and version != self.newest]
        return sorted(idle, key=lambda version: self._opened[version].used_s)

    def _close(self, versions: Sequence[int]) -> None:
        for version in versions:
            partition = self._opened.pop(version).partition
            if partition is not None:
                partition.close()


class Follower:
    """A thread that lets a server follow its store: looks for a newer snapshot, and lets old ones go."""

    def __init__(self, snapshots: OpenSnapshots, poll_s: float, report: Callable[[str], None]) -> None:
        self._snapshots, self._poll_s, self._report = snapshots, poll_s, report
        self._stopped = threading.Event()
        self._said = ""
        self._thread = threading.Thread(target=self._run, name="follow", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; one that is just opening a snapshot ends with the process."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._poll_s):
            try:
                if self._snapshots.follow():
                    self._say(f"offers snapshot {self._snapshots.newest}")
                self._snapshots.let_go()
            except FeatureStoreError as error:
                self._say(f"stays at snapshot {self._snapshots.newest}: {error}")

    def _say(self, line: str) -> None:
        """Report a line, but not again and again."""
        if line != self._said:
            self._said = line
            self._report(line)


BLOCK_BYTES = 4 << 20
_MASK_ROWS = 1 << 16
_NEWEST = "newest"
_NUMBER = re.compile(r"[0-9]{1,19}")  # MAX_VERSION has as many digits
_MOST_SHOWN = 40  # characters of a path, in a message


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where a server listens, and who may ask."""

    host: str = "127.0.0.1"
    port: int = 0  # 0: a free one
    tls: tuple[str, str] | None = None  # certificate and key, PEM
    tokens: Sequence[str] = ()  # none: everybody may ask


class FeatureServer(flight.FlightServerBase):
    """Answers as soon as it is made. Each call has a thread of its own; `limits` bound them."""

    def __init__(self, snapshots: OpenSnapshots, limits: CallLimits, listening: Listening) -> None:
        scheme = SECURE if listening.tls else "grpc"
        host = f"[{listening.host}]" if ":" in listening.host else listening.host
        self._snapshots, self._limits = snapshots, limits
        super().__init__(
            f"{scheme}://{host}:{listening.port}",
            tls_certificates=[listening.tls] if listening.tls else None,
            middleware={"token": TokenCheck(listening.tokens)} if listening.tokens else None,
        )
        self.address = f"{scheme}://{host}:{self.port}"

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Answer batches of keys with features, in the order asked. The command is an `Asked`."""
        with self._answering(), self._limits.call(context.peer()) as call:
            asked = parsed(Asked, descriptor.command)
            with self._snapshots.use(asked.version) as partition:
                _Exchange(partition, asked.features, call).answer(reader, writer)

    def do_get(self, context: Any, ticket: Any) -> Any:
        """Stream the live rows of a shard, or of all shards of this server. The ticket is a `ScanTicket`."""
        with self._answering():
            asked = parsed(ScanTicket, ticket.ticket)
            try:
                schema = live_schema(self._snapshots.store.info, asked.columns, asked.decode)
            except ValueError as error:
                raise QueryError(str(error)) from error
            return flight.GeneratorStream(schema, self._scan(context.peer(), asked))

    def do_action(self, _context: Any, action: Any) -> Iterator[bytes]:
        """Describe a snapshot: a `Described` as JSON."""
        with self._answering():
            if action.type != DESCRIBE:
                raise QueryError(f"this server has no action {action.type!r}, only {DESCRIBE!r}")
            asked = parsed(Asked, action.body.to_pybytes())
            with self._snapshots.use(asked.version) as partition:
                described = Described(
                    info=partition.info,
                    snapshot_id=partition.snapshot_id,
                    newest=self._snapshots.newest,
                    shards=self._snapshots.shards,
                    num_rows=partition.num_rows,
                )
                return iter([described.model_dump_json().encode()])

    def list_actions(self, _context: Any) -> Any:
        """List the one action."""
        return [(DESCRIBE, "Store, commit, shards and rows of a snapshot, as JSON.")]

    def list_flights(self, _context: Any, _criteria: Any) -> Iterator[Any]:
        """List the snapshots that can be asked for, the newest first; each with a ticket for every shard."""
        with self._answering():
            newest = self._snapshots.newest
            kept = [newest] if self._snapshots.fixed else log.versions(self._snapshots.store.storage)
            return (self._flight(version) for version in sorted({*kept, newest}, reverse=True) if version <= newest)

    def get_flight_info(self, _context: Any, descriptor: Any) -> Any:
        """Describe the scan of a snapshot, of path `newest` or its number."""
        with self._answering():
            name = "/".join(part.decode(errors="replace") for part in descriptor.path or []) or _NEWEST
            if name != _NEWEST and not _NUMBER.fullmatch(name):
                short = name if len(name) <= _MOST_SHOWN else f"{name[:_MOST_SHOWN]}..."
                raise QueryError(f"a path is {_NEWEST!r} or the number of a snapshot, not {short!r}")
            with self._snapshots.use(None if name == _NEWEST else int(name)) as partition:
                return self._flight(partition.snapshot_version, partition.num_rows)

    def _flight(self, version: int, num_rows: int = -1) -> Any:
        tickets = [ScanTicket(version=version, shard=shard).model_dump_json() for shard in self._snapshots.shards]
        return flight.FlightInfo(
            live_schema(self._snapshots.store.info),
            flight.FlightDescriptor.for_path(str(version)),
            [flight.FlightEndpoint(ticket, []) for ticket in tickets],
            num_rows,
            -1,
        )

    def _scan(self, peer: str, asked: ScanTicket) -> Iterator[pa.RecordBatch]:
        with self._answering(), self._limits.call(peer) as call, self._snapshots.use(asked.version) as partition:
            shards = self._snapshots.shards if asked.shard is None else (asked.shard,)
            if not set(shards) <= set(self._snapshots.shards):
                raise QueryError(
                    f"shard {asked.shard} is not here: this server has {shards_text(self._snapshots.shards)}"
                )
            snapshot = self._snapshots.store.snapshot(partition.snapshot_version)
            for batch in snapshot.arrow_batches(asked.columns, asked.decode, shards):
                with call.waiting():
                    yield batch

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Send errors of ours as such; of others the client learns that there was one, and stderr the rest."""
        try:
            with errors_sent():
                yield
        except (flight.FlightError, GeneratorExit):
            raise
        except (pa.ArrowException, OSError) as error:  # the client went away, or it is a failure of Flight itself
            raise flight.FlightInternalError(f"{type(error).__name__}") from error
        except Exception as error:
            sys.stderr.write(traceback.format_exc())
            raise flight.FlightInternalError(f"the server failed: {type(error).__name__}") from error


class _Exchange:
    """One exchange: keys of one partition, answered block by block in memory of its own, as Flight sends it later."""

    def __init__(self, partition: FeaturePartition, features: bool, call: Call) -> None:
        self._partition, self._features, self._call = partition, features, call
        self._schema = answer_schema(partition.info, features)
        self._block_rows = max(1, BLOCK_BYTES // partition.info.row_bytes) if features else _MASK_ROWS

    def answer(self, reader: Any, writer: Any) -> None:
        """Answer every batch of keys; each answer has as many rows as the batch, in one batch or several."""
        writer.begin(self._schema)
        while (keys_U := self._next(reader)) is not None:
            for start in range(0, len(keys_U), self._block_rows):
                batch = self._block(keys_U[start : start + self._block_rows])
                with self._call.waiting():
                    writer.write_batch(batch)

    def _next(self, reader: Any) -> Int64Array | None:
        with self._call.waiting():
            try:
                return keys_of(reader.read_chunk().data)
            except StopIteration:
                return None

    def _block(self, keys_C: Int64Array) -> pa.RecordBatch:
        if not self._features:
            return pa.record_batch([pa.array(self._partition.contains(keys_C))], schema=self._schema)
        info = self._partition.info
        memory = pa.allocate_buffer(len(keys_C) * info.row_bytes)
        out_CD = np.frombuffer(memoryview(memory), info.storage_dtype).reshape(-1, info.dim)
        missing_C = self._partition.lookup(keys_C, out=out_CD).missing_U
        feature = pa.FixedSizeBinaryArray.from_buffers(pa.binary(info.row_bytes), len(keys_C), [None, memory])
        return pa.record_batch([pa.array(~missing_C), feature], schema=self._schema)


def shards_text(shards: Sequence[int]) -> str:
    """Format shards for a message, e.g. `shards 0-31` or `shards 0, 5 and 7`."""
    if len(shards) > 1 and shards[-1] - shards[0] == len(shards) - 1:
        return f"shards {shards[0]}-{shards[-1]}"
    return f"shards {', '.join(map(str, shards))}"


_SHUTDOWN_S = 5.0


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """Limits of a server; times in seconds."""

    max_calls: int = 64
    poll_s: float = 10.0
    stuck_s: float = 60.0
    drain_s: float = 20.0


def serve(
    snapshots: OpenSnapshots,
    listening: Listening,
    options: ServingOptions,
    report: Callable[[str], None],
    ended: threading.Event,
) -> None:
    """Serve snapshots until `ended` is set, or Ctrl-C; then wait `drain_s` for the calls that run, and close them.

    Calls that last longer are cut off. `report` gets a line when the server answers, and one for every newer snapshot.
    Raises ServerError where nobody can listen at the address.
    """
    limits = CallLimits(options.max_calls, options.stuck_s)
    try:
        server = FeatureServer(snapshots, limits, listening)
    except (pa.ArrowException, OSError) as error:
        raise ServerError(
            f"cannot listen at {listening.host}:{listening.port}: {error}; if another program has the port, choose "
            "another by --port, or end what listens there"
        ) from error
    follower = Follower(snapshots, options.poll_s, report)
    try:
        report(f"{server.address} offers snapshot {snapshots.newest} of {snapshots.store.url}, {_shares(snapshots)}")
        ended.wait()
    finally:
        follower.stop()
        left = limits.drain(options.drain_s)
        if left:
            report(f"cut off {left} calls that did not end within {options.drain_s:g} s")
        _shut_down(server)
        snapshots.close()


@contextmanager
def ended_by_sigterm() -> Iterator[threading.Event]:
    """Lend an event that SIGTERM sets. For the main thread."""
    ended = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield ended
    finally:
        signal.signal(signal.SIGTERM, before)


def read_tls(certificate: Path, key: Path) -> tuple[str, str]:
    """Read certificate and key of a server, PEM. Raises FeatureStoreError where they do not fit."""
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
        return certificate.read_text(), key.read_text()
    except (OSError, UnicodeDecodeError) as error:  # ssl.SSLError is an OSError
        raise FeatureStoreError(f"--tls-cert {certificate} and --tls-key {key} are no pair of PEM: {error}") from error


def parse_shards(text: str, num_shards: int) -> list[int]:
    """Return the shards in a text as 0-31 or 0,4,8-11, ascending. Raises ValueError where the store has fewer."""
    shards: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > len("65535-65535"):
            raise ValueError(f"{part!r} is no shard: numbers and ranges, as 0-31 or 0,4,8-11")
        end = int(last) if dash else int(first)
        if not int(first) <= end < num_shards:
            raise ValueError(
                f"{part!r} ends before it begins, or beyond the store's {num_shards} shards, 0 to {num_shards - 1}"
            )
        shards.update(range(int(first), end + 1))
    return sorted(shards)


def _shares(snapshots: OpenSnapshots) -> str:
    num_shards = snapshots.store.info.num_shards
    held = len(snapshots.shards)
    return f"all {num_shards} shards" if held == num_shards else f"{held} of {num_shards} shards"


def _shut_down(server: FeatureServer) -> None:
    """End the server; where that does not end, the process."""
    thread = threading.Thread(target=server.shutdown, name="shutdown", daemon=True)
    thread.start()
    thread.join(_SHUTDOWN_S)
    if thread.is_alive():
        sys.stdout.flush()
        os._exit(0)


HEADER = "authorization"
_SCHEME = "Bearer "


def bearer(token: str) -> tuple[bytes, bytes]:
    """Return the header that carries a token."""
    return HEADER.encode(), f"{_SCHEME}{token}".encode()


class TokenCheck(flight.ServerMiddlewareFactory):
    """Refuses every call without one of the tokens."""

    def __init__(self, tokens: Sequence[str]) -> None:
        super().__init__()
        self._tokens = [f"{_SCHEME}{token}".encode() for token in tokens]

    def start_call(self, _info: Any, headers: Mapping[str, Sequence[str | bytes]]) -> None:
        """Let the call continue, or raise FlightUnauthenticatedError."""
        given = next((value for name, values in headers.items() if name.lower() == HEADER for value in values), "")
        sent = given if isinstance(given, bytes) else given.encode()
        # All are compared, each in a time that does not depend on what is in it.
        if not sum(hmac.compare_digest(sent, token) for token in self._tokens):
            raise flight.FlightUnauthenticatedError("no token, or one that this server does not know")
