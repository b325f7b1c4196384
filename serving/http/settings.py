"""User settings of a server, in one frozen object that is also sent to its worker processes."""

from dataclasses import dataclass
from pathlib import Path

from serving.scoring.budget import Budget


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
    record: int = 32
    record_file: Path | None = None
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
