"""Who may ask a server: bearer tokens, read from a file, one a line."""

import hmac
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyarrow import flight

from featurestore.errors import FeatureStoreError

HEADER = "authorization"
_SCHEME = "Bearer "
_FEWEST = 16  # characters of a token


def read_tokens(path: Path) -> list[str]:
    """Read the tokens in a file, one a line; empty lines and those that begin with # do not count.

    Raises FeatureStoreError where there is none, or one that is short or no ASCII.
    """
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise FeatureStoreError(f"cannot read --token-file {path}: {error}") from error
    tokens = [line for line in lines if line and not line.startswith("#")]
    if not tokens:
        raise FeatureStoreError(f"--token-file {path} has no token: write one a line, e.g. of openssl rand -hex 32")
    for number, token in enumerate(tokens, start=1):
        if len(token) < _FEWEST or not token.isascii() or not token.isprintable() or " " in token:
            raise FeatureStoreError(
                f"token {number} in {path} is no token: {_FEWEST} ASCII characters at least, without spaces"
            )
    return tokens


def bearer(token: str) -> tuple[bytes, bytes]:
    """Return the header that carries a token."""
    return HEADER.encode(), f"{_SCHEME}{token}".encode()


class TokenCheck(flight.ServerMiddlewareFactory):
    """Refuses every call without one of the tokens."""

    def __init__(self, tokens: Sequence[str]) -> None:
        super().__init__()
        self._tokens = [f"{_SCHEME}{token}".encode() for token in tokens]

    def start_call(self, _info: Any, headers: Mapping[str, Sequence[str | bytes]]) -> None:
        """Let the call go on, or raise FlightUnauthenticatedError."""
        given = next((value for name, values in headers.items() if name.lower() == HEADER for value in values), "")
        sent = given if isinstance(given, bytes) else given.encode()
        # All are compared, each in a time that does not depend on what is in it.
        if not sum(hmac.compare_digest(sent, token) for token in self._tokens):
            raise flight.FlightUnauthenticatedError("no token, or one that this server does not know")
