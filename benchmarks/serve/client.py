"""A lean client of HTTP/1.1: requests one after the other, or over several connections.

A request and its answer cost the client about 40 us of its core, so that the server is what is measured.
"""

import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
_HEAD = b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "


class Connection:
    """A connection that stays open; it sends bodies to be scored."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.close = self._socket.close

    def post(self, body: bytes) -> int:
        """Send a body, and read the whole answer; return its status. Raises OSError."""
        self._socket.sendall(_HEAD + f"{len(body)}\r\n\r\n".encode() + body)
        received = bytearray()
        while (end := received.find(b"\r\n\r\n")) < 0:
            received += self._some()
        head = bytes(received[:end]).decode("latin-1").lower()
        whole = end + 4 + int(head.partition("content-length:")[2].partition("\r\n")[0])
        while len(received) < whole:
            received += self._some()
        return int(head[9:12])

    def _some(self) -> bytes:
        data = self._socket.recv(1 << 18)
        if not data:
            raise ConnectionError("the server closed the connection")
        return data


@dataclass(frozen=True)
class Load:
    """Some requests: when they were over, and how long each took."""

    latency_s: Float64
    seconds: float
    statuses: Counter[int]

    @property
    def failed(self) -> int:
        """Requests with another answer than 200."""
        return self.statuses.total() - self.statuses[200]

    @property
    def rps(self) -> float:
        """Requests answered in a second."""
        return (len(self.latency_s) - self.failed) / self.seconds

    def ms(self, percent: float) -> float:
        """Return a percentile of the latencies, in milliseconds."""
        return float(np.percentile(self.latency_s, percent)) * 1e3


def one_after_the_other(port: int, bodies: Sequence[bytes], count: int) -> Load:
    """Send requests over one connection, each when the one before is answered."""
    return as_many_as_it_can(port, bodies, count, connections=1)


def as_many_as_it_can(port: int, bodies: Sequence[bytes], count: int, connections: int = 8) -> Load:
    """Send requests over several connections, each when the one before on its connection is answered."""
    latency_s, lock, numbers = np.zeros(count), threading.Lock(), iter(range(count))
    statuses: Counter[int] = Counter()
    begin = time.perf_counter()

    def work() -> None:
        with closing(Connection(port)) as connection:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                start = time.perf_counter()
                status = connection.post(bodies[number % len(bodies)])
                latency_s[number] = time.perf_counter() - start
                with lock:
                    statuses[status] += 1

    threads = [threading.Thread(target=work) for _ in range(min(connections, count))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Load(latency_s, time.perf_counter() - begin, statuses)
