"""A client that scores tables with a running server, over HTTP with Arrow bodies; without Torch."""

import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from featurestore.text import one_line
from serving.errors import ServerSettingsError, ServingError

_ARROW = "application/vnd.apache.arrow.stream"
_TIMEOUT_S = 60


@dataclass
class RemoteScorer:
    """Scores tables with a running server, over HTTP with Arrow bodies."""

    url: str
    token: str | None = None
    context: ssl.SSLContext | None = None
    """Context for the check of the server's certificate; None: the system's certificates."""
    version: int | None = None
    """Version of the model that answered last."""

    def score(self, table: pa.Table) -> list[NDArray[np.float32]]:
        """Return the logits of each row of a table. Raises ServingError if the server does not answer."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        answer = pa.ipc.open_stream(self._post("/v1/score", sink.getvalue().to_pybytes())).read_all()
        self.version = int((answer.schema.metadata or {})[b"version"])
        logits: Any = answer["logit"].combine_chunks()
        return [np.asarray(row.values.to_numpy(), np.float32) for row in logits]

    def _post(self, path: str, body: bytes) -> bytes:
        """Post an Arrow body to the server, and return its answer. Raises ServingError."""
        headers = {"Content-Type": _ARROW} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        try:
            request = urllib.request.Request(f"{self.url.rstrip('/')}{path}", body, headers)
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=self.context) as response:
                answer: bytes = response.read()
                return answer
        except urllib.error.HTTPError as failure:
            said = failure.read(2_000).decode(errors="replace")
            raise ServingError(f"{self.url} answers {failure.code}: {one_line(said)}") from None
        except (OSError, ValueError) as failure:
            if isinstance(why := getattr(failure, "reason", None), ssl.SSLCertVerificationError):
                raise ServingError(
                    f"{self.url}: its certificate is refused, {why.verify_message}; name those to trust by --ca"
                ) from None
            raise ServingError(
                f"{self.url} does not answer: {one_line(failure)}; is that the server's --url?"
            ) from None


def ca_context(file: Path | None) -> ssl.SSLContext | None:
    """Return a TLS context that trusts the PEM file of --ca, or None without one. Raises ServerSettingsError."""
    if file is None:
        return None
    try:
        return ssl.create_default_context(cafile=file)
    except OSError as failure:  # of TLS too
        why = "it has no certificate" if isinstance(failure, ssl.SSLError) else failure.strerror
        raise ServerSettingsError(f"--ca {file}: {why}; name a PEM file of certificates") from None
