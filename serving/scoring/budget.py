"""The budget of a request body: limits that are checked before anything of that size is built.

docs/SECURITY.md has the same limits as a table; serving/scoring/request.py measures what a body holds.
"""

from collections.abc import Iterable
from dataclasses import dataclass

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
