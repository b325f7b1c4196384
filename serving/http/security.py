"""Access tokens and TLS certificates of a server.

The files of tokens, certificate and key are read again when they change, so that a renewal needs no restart. A token is
sent as `Authorization: Bearer TOKEN` and compared in constant time; a file may hold several, one per line, so that a
new one can be handed out before the old one is removed. Health checks need no token. Certificate and key are tested
before the server listens, so that a wrong file is an error at the start instead of a failed handshake later.
"""

import hashlib
import hmac
import logging
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from featurestore.console.files import problem_of_dates, read_tokens
from featurestore.errors import TokenFileError
from serving.errors import ServerSettingsError
from serving.http.errors import error_response
from serving.http.settings import AccessSettings, ServerSettings

logger = logging.getLogger("serving")

LOOPBACKS = ("127.0.0.1", "::1", "localhost")
OPEN_PATHS = ("/v2/health/live", "/v2/health/ready")


class TokenGuard:
    """ASGI middleware that answers 401 to requests without one of the tokens, except health checks."""

    def __init__(self, app: ASGIApp, tokens: list[str], on_refusal: Callable[[], None]) -> None:
        """`tokens` may change later."""
        self.app, self._tokens, self._on_refusal = app, tokens, on_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._allows(scope):
            self._on_refusal()
            message = "no valid token: send the header Authorization: Bearer TOKEN, with a token of the server's file"
            response = error_response(401, message, {"WWW-Authenticate": "Bearer", "Connection": "close"})
            await response(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, token = sent.partition(b" ")
        return matches_token(token.strip(), self._tokens) and kind.lower() == b"bearer"


def matches_token(token: bytes, tokens: Sequence[str]) -> bool:
    """Return whether the token is one of these, in constant time: all are compared."""
    digest = hashlib.sha256(token).digest()
    fits = [hmac.compare_digest(digest, hashlib.sha256(each.encode()).digest()) for each in tokens]
    return any(fits)


class Credentials:
    """The tokens and the TLS context of a server, read from their files; `refresh` reads changed files again."""

    def __init__(self, settings: AccessSettings) -> None:
        """Read the files. Raises ServerSettingsError, TokenFileError."""
        self._settings = settings
        self._seen = self._look()
        self.tokens = None if settings.token_file is None else read_tokens(settings.token_file)
        """Always the same list, whose tokens change."""
        self.context: ssl.SSLContext | None = None
        """Context of every handshake, which then uses the newest certificate."""
        if settings.tls_cert is not None:
            self.context = self._newest = tls_context(settings.tls_cert, settings.tls_key)
            self.context.sni_callback = self._choose

    def refresh(self) -> None:
        """Read changed files again; if one is wrong, the previous credentials stay in use."""
        seen, settings = self._look(), self._settings
        if seen == self._seen:
            return
        self._seen = seen
        try:
            if settings.tls_cert is not None:
                newest = tls_context(settings.tls_cert, settings.tls_key)
                _warn_of_dates(settings.tls_cert)
                self._newest = newest
            if settings.token_file is not None and self.tokens is not None:
                self.tokens[:] = read_tokens(settings.token_file)
        except (ServerSettingsError, TokenFileError) as error:
            logger.error("the previous certificate and tokens stay in use: %s", error)
            return
        logger.info("read certificate and tokens again, as a file of them has changed")

    def _choose(self, connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._newest

    def _look(self) -> list[tuple[int, int, int] | None]:
        files = (self._settings.token_file, self._settings.tls_cert, self._settings.tls_key)
        return [_identity(file) for file in files if file is not None]


def check_files(settings: AccessSettings) -> None:
    """Check the files of tokens, certificate and key before the server listens.

    Raises ServerSettingsError, TokenFileError."""
    if settings.token_file is not None:
        read_tokens(settings.token_file)
        if settings.token_file.stat().st_mode & 0o004:
            logger.warning("every user of this machine can read %s: run chmod 600 on it", settings.token_file)
    if settings.tls_cert is not None:
        tls_context(settings.tls_cert, settings.tls_key)
        _warn_of_dates(settings.tls_cert)
    elif settings.tls_key is not None:
        raise ServerSettingsError("--tls-key needs --tls-cert: give both, or neither")
    if (
        isinstance(settings, ServerSettings)
        and settings.record_file
        and not settings.record_file.absolute().parent.is_dir()
    ):
        raise ServerSettingsError(f"--record-file {settings.record_file}: its folder does not exist; create it first")
    if settings.host not in LOOPBACKS and settings.token_file is None:
        logger.warning("no --token-file on %s: everyone who can reach this server can use it", settings.host)
    if settings.host not in LOOPBACKS and settings.tls_cert is None:
        logger.warning("no TLS on %s: requests can be read on the network", settings.host)


def tls_context(cert: Path, key: Path | None) -> ssl.SSLContext:
    """Create the server's TLS context from a certificate chain and its key, both PEM. Raises ServerSettingsError."""
    key = cert if key is None else key
    for option, file in (("--tls-cert", cert), ("--tls-key", key)):
        try:
            file.read_bytes()
        except OSError as failure:
            raise ServerSettingsError(f"{option} {file}: {failure.strerror}; name a PEM file") from None
    try:
        problem_of_dates(cert)
    except ValueError:
        raise ServerSettingsError(
            f"--tls-cert {cert} has no certificate; give a PEM file, the server's certificate first"
        ) from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except _EncryptedKeyError:
        raise ServerSettingsError(f"--tls-key {key} has a password; decrypt it by `openssl pkey`") from None
    except (ssl.SSLError, OSError) as failure:
        reason = getattr(failure, "reason", None)
        if reason == "KEY_VALUES_MISMATCH":
            problem = f"is not the key of {cert}; give a matching pair"
        else:
            problem = "has no usable key; give the certificate's, in PEM"
        raise ServerSettingsError(f"{'--tls-cert' if key is cert else '--tls-key'} {key} {problem}") from None
    return context


def _identity(file: Path) -> tuple[int, int, int] | None:
    """Return inode, size and time of a file, to detect changes; None if it cannot be read."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


class _EncryptedKeyError(Exception):
    pass


def _no_password() -> str:
    raise _EncryptedKeyError


def _warn_of_dates(file: Path) -> None:
    if problem := problem_of_dates(file):
        logger.warning("%s", problem)
