"""Who may ask a server: callers that send one of its bearer tokens."""

import hmac
from collections.abc import Mapping, Sequence
from typing import Any

from pyarrow import flight

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
