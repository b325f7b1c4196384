"""Limits of a server: how many calls it answers at once, and how long it waits for a client that does nothing.

Flight has neither in Python: a write to a client that does not read waits for ever, and nothing there can end it. So
the connection of such a client is shut down below Flight, at its socket.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from featurestore.errors import UnavailableError

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
