"""Command serve: answer requests over HTTP with the version of a model that is in use."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featurestore.console.commandline import CommandApp
from featurestore.published.paths import run_path
from serving.http.settings import ServerSettings

if TYPE_CHECKING:
    from serving.http.live.model import ModelSource

app = CommandApp()

_DAY_S = 86_400
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or s3:// address of the published model.")]
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")]
Workers = Annotated[int, typer.Option(min=1, max=1024, help="Processes that share the port.")]
Name = Annotated[str | None, typer.Option(help="Name in /v2/models/NAME; by default the last part of MODEL.")]
TlsCert = Annotated[Path | None, typer.Option(help="Certificate chain of the server, PEM.")]
TlsKey = Annotated[Path | None, typer.Option(help="Its key, PEM; by default in the file of --tls-cert.")]
TokenFile = Annotated[Path | None, typer.Option(help="File with one token per line; requests without one get 401.")]
MaxBodyMb = Annotated[float, typer.Option(min=0.001, max=1024, help="Largest body, in MB; above it 413.")]
MaxRequests = Annotated[int, typer.Option(min=1, help="Most requests in a body; above it 413.")]
MaxCandidates = Annotated[int, typer.Option(min=1, help="Most candidates in a body; above it 413.")]
MaxBehaviors = Annotated[int, typer.Option(min=1, help="Most values in one list of a user; above it 413.")]
MaxPairs = Annotated[int, typer.Option(min=1, help="Most pairs of candidate and behaviour in a body; above it 413.")]
MaxValues = Annotated[int, typer.Option(min=1, help="Most values and names in a body; above it 413.")]
MaxWaitMs = Annotated[float, typer.Option(min=0, max=60_000, help="A request that would wait longer gets 503 at once.")]
ReadTimeoutS = Annotated[
    float, typer.Option(min=0.1, max=_DAY_S, help="Time for a client to send a request, and to take its answer.")
]
DrainS = Annotated[int, typer.Option(min=0, max=_DAY_S, help="Time for running requests to end after SIGTERM.")]
PollS = Annotated[
    float, typer.Option(min=0.05, max=_DAY_S, help="How often to look for another version and newer vectors.")
]
Record = Annotated[int, typer.Option(min=0, max=10_000, help="Requests to keep for the next version's warm-up.")]
RecordFile = Annotated[Path | None, typer.Option(help="File to keep them across restarts. It contains user data.")]
SlowMs = Annotated[float, typer.Option(min=0, help="Log requests that take longer, with their stages and sizes.")]
LogRequests = Annotated[
    bool, typer.Option("--log-requests", help="Log the body of every request. The log then contains user data.")
]
CacheDir = Annotated[Path | None, typer.Option(help="Folder for local copies; by default that of the feature store.")]


@app.command(
    epilog="Examples:\n\n"
    "- `python -m serving data/models/ctr --port 8080`\n\n"
    "- `python -m serving serve s3://shop/models/ctr --host 0.0.0.0 --workers 4 --tls-cert tls.crt --tls-key tls.key "
    "--token-file tokens.txt`"
)
def serve(
    model: Model,
    host: Host = ServerSettings.host,
    port: Port = ServerSettings.port,
    workers: Workers = ServerSettings.workers,
    name: Name = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
    max_body_mb: MaxBodyMb = ServerSettings.max_body_mb,
    max_requests: MaxRequests = ServerSettings.max_requests,
    max_candidates: MaxCandidates = ServerSettings.max_candidates,
    max_behaviors: MaxBehaviors = ServerSettings.max_behaviors,
    max_pairs: MaxPairs = ServerSettings.max_pairs,
    max_values: MaxValues = ServerSettings.max_values,
    max_wait_ms: MaxWaitMs = ServerSettings.max_wait_ms,
    read_timeout_s: ReadTimeoutS = ServerSettings.read_timeout_s,
    drain_s: DrainS = ServerSettings.drain_s,
    poll_s: PollS = ServerSettings.poll_s,
    record: Record = ServerSettings.record,
    record_file: RecordFile = None,
    slow_ms: SlowMs = ServerSettings.slow_ms,
    log_requests: LogRequests = False,
    cache_dir: CacheDir = None,
) -> None:
    """Answer requests over HTTP: /v1/score, the Open Inference Protocol, and /metrics.

    The server loads a version that is put in use, or newer vectors, while the old ones answer, and switches without
    failing a request. On SIGTERM it finishes running requests first; a second signal ends it at once.
    """
    _find(model)
    from serving.http.workers import serve as listen_and_answer

    settings = ServerSettings(
        model=model,
        name=name or run_path(model).name or "model",
        host=host,
        port=port,
        workers=workers,
        tls_cert=tls_cert,
        tls_key=tls_key,
        token_file=token_file,
        max_body_mb=max_body_mb,
        max_requests=max_requests,
        max_candidates=max_candidates,
        max_behaviors=max_behaviors,
        max_pairs=max_pairs,
        max_values=max_values,
        max_wait_ms=max_wait_ms,
        read_timeout_s=read_timeout_s,
        drain_s=drain_s,
        poll_s=poll_s,
        record=record,
        record_file=record_file,
        slow_ms=slow_ms,
        log_requests=log_requests,
        cache_dir=cache_dir,
    )
    raise typer.Exit(listen_and_answer(settings, _published))


def _find(model: str) -> None:
    """Report a wrong folder at once, before Torch is loaded and the port is taken. Raises BundleNotFoundError."""
    from featurestore.storage.storage import Storage
    from serving.bundle.log import read_version

    read_version(Storage(model))


def _published(settings: ServerSettings) -> "ModelSource":
    """Open the source of models. Loads Torch, so it is called only after files are checked, and only in workers."""
    from serving.http.live.source import BundleSource

    return BundleSource(settings)
