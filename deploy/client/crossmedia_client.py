"""A client of CrossMedia's scorer in one file: it needs Python 3.9 or later, and no other package.

    from crossmedia_client import Scorer

    scorer = Scorer("http://127.0.0.1:8080")
    answer = scorer.score({"user": 17, ...}, {"ad_item": [5, 9, 12], ...}, context={"ad_scene": 1})
    answer["scores"]

Install it by `pip install ./deploy/client`, or copy this file. `GET /v1/example` of a server has an example of a
request to its model, and `GET /openapi.json` says what each column takes.
"""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Scorer", "ScorerError"]


class ScorerError(Exception):
    """The scorer refused a request, or did not answer; `status` is the HTTP status, None without an answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Scorer:
    """A scorer at an address. Each thread has a connection of its own, which stays open between requests."""

    def __init__(self, url: str, token: str | None = None, *, ca: str | None = None, timeout_s: float = 1.0) -> None:
        """`ca`: a PEM file of certificates to trust, in place of the system's."""
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url} is not an address of a scorer: write it as http://127.0.0.1:8080")
        self._connect = partial(HTTPConnection, parts.hostname, parts.port, timeout=timeout_s)
        if parts.scheme == "https":
            tls = ssl.create_default_context(cafile=ca)
            self._connect = partial(HTTPSConnection, parts.hostname, parts.port, timeout=timeout_s, context=tls)
        self._of_thread = threading.local()
        self._path = parts.path
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"

    def score(
        self,
        user: Mapping[str, Any],
        candidates: Mapping[str, Sequence[Any]],
        *,
        context: Mapping[str, Any] | None = None,
        logits: bool = False,
    ) -> dict[str, Any]:
        """Score the candidates of a user: `scores`, `unknown`, `missing`, `version`, `vectors`, and `logits` if asked.

        Raises ScorerError.
        """
        request = {"user": dict(user), "context": dict(context or {}), "candidates": dict(candidates)}
        return self.call("POST", "/v1/score" + ("?logits=true" if logits else ""), request)

    def score_many(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Score several requests, mappings with `user`, `candidates` and `context`, by one model, in their order.

        Raises ScorerError; if one request is wrong, none is scored.
        """
        answers: list[dict[str, Any]] = self.call("POST", "/v1/score", {"requests": list(requests)})["answers"]
        return answers

    def example(self) -> dict[str, Any]:
        """Return a request that the server's model can score. Raises ScorerError."""
        return self.call("GET", "/v1/example")

    def is_ready(self) -> bool:
        """Return whether the server answers, and its model is warm."""
        try:
            self.call("GET", "/v2/health/ready")
        except ScorerError:
            return False
        return True

    def close(self) -> None:
        """Close this thread's connection; the next request opens another."""
        if hasattr(self._of_thread, "connection"):
            self._of_thread.connection.close()

    def call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """Send JSON to an address of the server, and return its answer. Raises ScorerError."""
        content = None if body is None else json.dumps(body, allow_nan=False).encode()
        try:
            status, answer = self._sent(method, path, content)
        except (OSError, HTTPException) as failure:
            raise ScorerError(f"{self.url} does not answer: {failure or type(failure).__name__}") from failure
        try:
            found = json.loads(answer)
        except ValueError:
            found = answer.decode(errors="replace")[:500]
        if status != 200:
            message = found.get("error", found) if isinstance(found, dict) else found
            raise ScorerError(f"{self.url} answers {status}: {message}", status)
        if not isinstance(found, dict):
            raise ScorerError(f"{self.url}{path} is not a scorer's address: its answer is not a JSON object", status)
        return found

    def _sent(self, method: str, path: str, content: bytes | None) -> tuple[int, bytes]:
        """Send a request, and again on a new connection where the server has closed the idle one."""
        connection = self._of_thread.connection = getattr(self._of_thread, "connection", None) or self._connect()
        is_kept = connection.sock is not None
        try:
            connection.request(method, self._path + path, content, self._headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, HTTPException) as failure:
            connection.close()  # what comes after a timeout must not be taken for the answer to the next request
            if is_kept and isinstance(failure, (ConnectionError, HTTPException)):
                return self._sent(method, path, content)  # it opens the connection again
            raise
