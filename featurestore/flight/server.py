"""The server of features: keys in, features and a mask out, over Arrow Flight.

Letters of shapes: U keys asked, C of them in a block, D feature width.
"""

import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import flight

from featurestore import log
from featurestore.errors import QueryError
from featurestore.flight.access import TokenCheck
from featurestore.flight.limits import Call, CallLimits
from featurestore.flight.opened import OpenSnapshots
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
    ranges_bytes,
)
from featurestore.format.arrow import live_schema
from featurestore.keys import Int64Array
from featurestore.lookup.partition import FeaturePartition

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
        """Describe a snapshot: a `Described` as JSON, then the ranges of an int8 store."""
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
                return iter([described.model_dump_json().encode(), ranges_bytes(partition.codec)])

    def list_actions(self, _context: Any) -> Any:
        """List the one action."""
        return [(DESCRIBE, "Store, commit, shards and rows of a snapshot, as JSON; then the ranges of an int8 store.")]

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
