"""The settings of a server, among them the budget of a body: limits that hold before anything of that size is built.

The settings are frozen objects that are also sent to worker processes. docs/SECURITY.md has the budget as a table;
serving/scoring/sent.py measures what a body holds.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from featurestore.published.paths import run_path
from serving.errors import RequestTooLargeError
from serving.problems import Problem

_DAY_S = 86_400


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The limits of a body's content; its bytes are limited while they are read."""

    max_requests: Annotated[int, typer.Option(min=1, help="Most requests in a body; above it 413.")] = 1_000
    max_candidates: Annotated[int, typer.Option(min=1, help="Most candidates in a body; above it 413.")] = 10_000
    max_behaviors: Annotated[int, typer.Option(min=1, help="Most values in one list of a user; above it 413.")] = 10_000
    max_pairs: Annotated[
        int, typer.Option(min=1, help="Most pairs of candidate and behaviour in a body; above it 413.")
    ] = 2_000_000
    max_values: Annotated[int, typer.Option(min=1, help="Most values and names in a body; above it 413.")] = 200_000
    """Numbers, texts, lists and names of a JSON body; elements of a tensor, and of all columns of a table."""
    max_depth: int = 32
    """Lists and objects inside each other, in JSON."""
    max_name_length: int = 200
    """Characters in the name of a column."""
    max_messages: int = 256
    """Record batches of an Arrow stream."""
    max_schema_bytes: int = 256 << 10
    """Of an Arrow stream."""

    def check(self, limit: str, value: int) -> None:
        """Raise RequestTooLargeError if the value exceeds the limit of this name."""
        if value > (most := getattr(self, f"max_{limit}")):
            raise RequestTooLargeError(Problem[f"OVER_MAX_{limit.upper()}"], value, most)

    def check_names(self, names: Iterable[str]) -> None:
        """Raise RequestTooLargeError for a name that is too long."""
        self.check("name_length", max(map(len, names), default=0))


@dataclass(frozen=True, kw_only=True)
class AccessSettings:
    """Address, tokens, certificate and timeouts of a server."""

    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8080
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain of the server, PEM.")] = None
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM; by default in the file of --tls-cert.")] = None
    token_file: Annotated[
        Path | None, typer.Option(help="File with one token per line; requests without one get 401.")
    ] = None
    read_timeout_s: Annotated[
        float, typer.Option(min=0.1, max=_DAY_S, help="Time for a client to send a request, and to take its answer.")
    ] = 30.0
    drain_s: Annotated[int, typer.Option(min=0, max=_DAY_S, help="Time for running requests to end after SIGTERM.")] = (
        30
    )


@dataclass(frozen=True, kw_only=True)
class ServerSettings(Budget, AccessSettings):
    """The options of `crossmedia serve`."""

    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or s3:// address of the published model.")]
    name: Annotated[str, typer.Option(help="Name in /v2/models/NAME.", show_default="the last part of MODEL")] = ""
    workers: Annotated[int, typer.Option(min=1, max=1024, help="Processes that share the port.")] = 1
    max_body_mb: Annotated[float, typer.Option(min=0.001, max=1024, help="Largest body, in MB; above it 413.")] = 8.0
    max_wait_ms: Annotated[
        float, typer.Option(min=0, max=60_000, help="A request that would wait longer gets 503 at once.")
    ] = 50.0
    health_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="A further port, where a thread answers health checks alone: plain HTTP."),
    ] = None
    poll_s: Annotated[
        float, typer.Option(min=0.05, max=_DAY_S, help="How often to look for another version and newer vectors.")
    ] = 2.0
    cache_dir: Annotated[
        Path | None, typer.Option(help="Folder for local copies; by default that of the feature store.")
    ] = None

    @property
    def model_name(self) -> str:
        """Name of the model in the addresses of the Open Inference Protocol."""
        return self.name or run_path(self.model).name or "model"

    @property
    def max_body_bytes(self) -> int:
        """The largest body that is read."""
        return round(self.max_body_mb * 1e6)
