"""The life of a feature server: opened, following its store, and at SIGTERM drained and ended."""

import os
import signal
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pyarrow as pa

from featurestore.errors import FeatureStoreError, ServerError
from featurestore.flight.limits import CallLimits
from featurestore.flight.opened import Follower, OpenSnapshots
from featurestore.flight.server import FeatureServer, Listening

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
