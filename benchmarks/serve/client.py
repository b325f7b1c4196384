"""A lean client of HTTP/1.1: requests one after the other, or over several connections.

A request and its answer cost the client about 40 us of its core, so that the server is what is measured.
"""

import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


class Connection:
    """A connection that stays open; it sends bodies to one path."""

    def __init__(self, port: int, path: str = "/v1/score") -> None:
        self._port = port
        self._open()
        self._head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "

    def post(self, body: bytes) -> tuple[int, bytes]:
        """Send a body; return the status and the body of the answer. Raises OSError.

        A connection that the server closed while nothing was sent is opened again, as all clients do.
        """
        message = f"{self._head}{len(body)}\r\n\r\n".encode() + body
        try:
            self._socket.sendall(message)
            received = bytearray(self._some())
        except ConnectionError:
            self._socket.close()
            self._open()
            self._socket.sendall(message)
            received = bytearray(self._some())
        while (end := received.find(b"\r\n\r\n")) < 0:
            received += self._some()
        head = bytes(received[:end]).decode("latin-1").lower()
        length = int(head.partition("content-length:")[2].partition("\r\n")[0])
        answer = received[end + 4 :]
        while len(answer) < length:
            answer += self._some()
        return int(head[9:12]), bytes(answer)

    def _open(self) -> None:
        self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _some(self) -> bytes:
        data = self._socket.recv(1 << 18)
        if not data:
            raise ConnectionError("the server closed the connection")
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._socket.close()


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
        with Connection(port) as connection:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                start = time.perf_counter()
                status, _ = connection.post(bodies[number % len(bodies)])
                latency_s[number] = time.perf_counter() - start
                with lock:
                    statuses[status] += 1

    threads = [threading.Thread(target=work) for _ in range(min(connections, count))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Load(latency_s, time.perf_counter() - begin, statuses)
