"""Command serve: answer lookups of other processes, machines and languages over Arrow Flight."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurestore.commands.common import WHICH, Url, read_version_name
from featurestore.console.commandline import CommandApp
from featurestore.console.output import print_summary, print_warning, progress_bar

if TYPE_CHECKING:
    from featurestore.flight.server import Listening

app = CommandApp()


@app.command(
    epilog="Examples:\n\n"
    "- `python -m featurestore serve data/features --port 8815`\n\n"
    "- `python -m featurestore serve s3://bucket/features --host 0.0.0.0 --port 8815 --shards 0-31"
    " --tls-cert server.pem --tls-key server.key --token-file tokens.txt`"
)
def serve(
    url: Url,
    host: Annotated[str, typer.Option("--host", help="Address to listen at; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen at; 0 takes a free one.")
    ] = 8815,
    shards: Annotated[
        str | None, typer.Option("--shards", help="Shards to offer, as 0-31 or 0,4,8-11; all by default.")
    ] = None,
    version: Annotated[
        Any,
        typer.Option(
            "--version",
            parser=read_version_name,
            metavar=WHICH,
            help="Offer this snapshot alone, or that of a channel, wherever it is moved; by default the newest, also"
            " later ones.",
        ),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", help="Certificate of the server, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="Key of the certificate, PEM.")] = None,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="File of tokens, one a line; a client needs one of them.")
    ] = None,
    cache_dir: Annotated[Path | None, typer.Option("--cache-dir", help="Folder of local files of shards.")] = None,
    max_calls: Annotated[
        int, typer.Option("--max-calls", min=1, help="Calls answered at once; more are refused.")
    ] = 64,
    poll_s: Annotated[
        float, typer.Option("--poll-s", min=0.1, help="Seconds between looks for a new snapshot.")
    ] = 10.0,
    stuck_s: Annotated[
        float, typer.Option("--stuck-s", min=0.1, help="Seconds after which a client that does not read is cut off.")
    ] = 60.0,
    drain_s: Annotated[
        float, typer.Option("--drain-s", min=0, help="Seconds that calls have to end at SIGTERM.")
    ] = 20.0,
) -> None:
    """Answer lookups over Arrow Flight: keys in, features and a mask out. `featurestore.connect` is the client.

    Prints its address when it answers. It offers newer snapshots as they are committed. SIGTERM ends it.
    """
    from featurestore.flight.server import OpenSnapshots, ServingOptions, ended_by_sigterm, parse_shards
    from featurestore.flight.server import serve as serve_store
    from featurestore.store import FeatureStore

    _check_pair(tls_cert, tls_key)
    store = FeatureStore.open(url)
    try:
        chosen = range(store.info.num_shards) if shards is None else parse_shards(shards, store.info.num_shards)
    except ValueError as error:
        raise typer.BadParameter(f"--shards: {error}") from error
    listening = _listening(host, port, tls_cert, tls_key, token_file)
    with progress_bar("shards") as progress:
        snapshots = OpenSnapshots(store, chosen, version=version, cache_dir=cache_dir, progress=progress)
    options = ServingOptions(max_calls=max_calls, poll_s=poll_s, stuck_s=stuck_s, drain_s=drain_s)
    with ended_by_sigterm() as ended:
        serve_store(snapshots, listening, options, _say, ended)


def _check_pair(tls_cert: Path | None, tls_key: Path | None) -> None:
    if (tls_cert is None) != (tls_key is None):
        raise typer.BadParameter("--tls-cert and --tls-key go together")


def _listening(
    host: str, port: int, tls_cert: Path | None, tls_key: Path | None, token_file: Path | None
) -> "Listening":
    """Read who may connect; warn of a certificate that has expired, or soon will."""
    from featurestore.console.files import problem_of_dates, read_tokens
    from featurestore.flight.server import Listening, read_tls

    tls = read_tls(tls_cert, tls_key) if tls_cert and tls_key else None
    listening = Listening(host=host, port=port, tls=tls, tokens=read_tokens(token_file) if token_file else ())
    if tls_cert is not None and (problem := problem_of_dates(tls_cert)):
        print_warning(problem)
    return listening


def _say(line: str) -> None:
    print_summary(line)
