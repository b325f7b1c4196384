"""The settings of a server, and the budget of a request body: limits that hold before anything of that size is built.

The settings are frozen objects that are also sent to worker processes. docs/SECURITY.md has the budget as a table;
serving/scoring/request.py measures what a body holds.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from serving.errors import RequestTooLargeError

_WORDS = {
    "requests": ("requests", "send several bodies, or let the server take more by --max-requests"),
    "candidates": ("candidates", "send several bodies, or let the server take more by --max-candidates"),
    "behaviors": ("behaviours in one list", "send the newest ones, or let the server take more by --max-behaviors"),
    "pairs": (
        "pairs of a candidate and a behaviour",
        "send fewer candidates or behaviours, or let the server take more by --max-pairs",
    ),
    "values": ("values", "send several bodies, or let the server take more by --max-values"),
    "depth": ("lists and objects inside each other", "send lists as deep as the model's columns are"),
    "name_length": ("characters in a name", "send the model's columns"),
    "text_bytes": ("bytes of texts in its dictionaries", "write fewer record batches, or plain texts"),
    "messages": ("messages", "write the stream with fewer record batches"),
    "schema_bytes": ("bytes of schema", "send the model's columns, without metadata"),
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The limits of a body's content; its bytes are limited while they are read."""

    requests: int = 1_000
    candidates: int = 10_000
    """Of all requests together."""
    behaviors: int = 10_000
    """Values in one list of a user."""
    pairs: int = 2_000_000
    """Candidates times behaviours, of all requests together."""
    values: int = 200_000
    """Numbers, texts, lists and names of a JSON body; elements of a tensor, and of all columns of a table."""
    depth: int = 32
    """Lists and objects inside each other, in JSON."""
    name_length: int = 200
    """Characters in the name of a column."""
    text_bytes: int = 16_000_000
    """Of the dictionaries of all record batches of an Arrow stream, whether batches share them or not."""
    messages: int = 256
    """Record batches and dictionaries of an Arrow stream."""
    schema_bytes: int = 256 << 10
    """Of an Arrow stream."""

    def check(self, limit: str, value: int) -> None:
        """Raise RequestTooLargeError if the value exceeds the limit of this name."""
        if value > (most := getattr(self, limit)):
            what, way_out = _WORDS[limit]
            raise RequestTooLargeError(f"the body has {value:,} {what}; this server takes at most {most:,}: {way_out}")

    def check_names(self, names: Iterable[str]) -> None:
        """Raise RequestTooLargeError for a name that is too long."""
        self.check("name_length", max(map(len, names), default=0))


@dataclass(frozen=True, kw_only=True)
class AccessSettings:
    """Address, tokens, certificate and timeouts of a server."""

    host: str = "127.0.0.1"
    port: int = 8080
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token_file: Path | None = None
    read_timeout_s: float = 30.0
    """Time for a client to send a request, and to read its answer."""
    drain_s: int = 30
    """Time for running requests to end after SIGTERM."""

    @property
    def scheme(self) -> str:
        """https if a certificate is given, else http."""
        return "https" if self.tls_cert is not None else "http"


@dataclass(frozen=True, kw_only=True)
class ServerSettings(AccessSettings):
    """All options of `python -m serving serve`, see its help texts."""

    model: str
    """Folder or address of the bundle."""
    name: str
    """Name of the model in the addresses of the Open Inference Protocol."""
    workers: int = 1
    max_body_mb: float = 8.0
    max_requests: int = Budget.requests
    max_candidates: int = Budget.candidates
    max_behaviors: int = Budget.behaviors
    max_pairs: int = Budget.pairs
    max_values: int = Budget.values
    max_wait_ms: float = 50.0
    poll_s: float = 2.0
    slow_ms: float = 100.0
    log_requests: bool = False
    cache_dir: Path | None = None

    @property
    def max_body_bytes(self) -> int:
        """The largest body that is read."""
        return round(self.max_body_mb * 1e6)

    @property
    def budget(self) -> Budget:
        """The limits of a body's content."""
        return Budget(
            requests=self.max_requests,
            candidates=self.max_candidates,
            behaviors=self.max_behaviors,
            pairs=self.max_pairs,
            values=self.max_values,
        )
