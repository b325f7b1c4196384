"""Command serve: answer lookups of other processes, machines and languages over Arrow Flight."""

import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurestore.commands.common import WHICH, Url, read_version_name
from featurestore.console.commandline import CommandApp
from featurestore.console.output import print_summary, print_warning, progress_bar
from featurestore.errors import FeatureStoreError

if TYPE_CHECKING:
    from featurestore.flight.server import Listening

app = CommandApp()


@app.command(
    epilog="Examples:\n\n"
    "- `python -m featurestore serve data/features --port 8815`\n\n"
    "- `python -m featurestore serve s3://bucket/features --host 0.0.0.0 --port 8815"
    " --tls-cert server.pem --tls-key server.key --token-file tokens.txt`"
)
def serve(
    url: Url,
    host: Annotated[str, typer.Option("--host", help="Address to listen at; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen at; 0 takes a free one.")
    ] = 8815,
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
    poll_s: Annotated[
        float, typer.Option("--poll-s", min=0.1, help="Seconds between looks for a new snapshot.")
    ] = 10.0,
) -> None:
    """Answer lookups over Arrow Flight: keys in, features and a mask out. `featurestore.connect` is the client.

    Prints its address when it answers. It offers newer snapshots as they are committed. SIGTERM ends it.
    """
    from featurestore.flight.server import OpenSnapshots
    from featurestore.flight.server import serve as serve_store
    from featurestore.store import FeatureStore

    _check_pair(tls_cert, tls_key)
    store = FeatureStore.open(url)
    listening = _listening(host, port, tls_cert, tls_key, token_file)
    with progress_bar("shards") as progress:
        snapshots = OpenSnapshots(store, version=version, cache_dir=cache_dir, progress=progress)
    serve_store(snapshots, listening, poll_s, print_summary)


def _check_pair(tls_cert: Path | None, tls_key: Path | None) -> None:
    if (tls_cert is None) != (tls_key is None):
        raise typer.BadParameter("--tls-cert and --tls-key go together")


def read_tls(certificate: Path, key: Path) -> tuple[str, str]:
    """Read certificate and key of a server, PEM. Raises FeatureStoreError where they do not fit."""
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
        return certificate.read_text(), key.read_text()
    except (OSError, UnicodeDecodeError) as error:  # ssl.SSLError is an OSError
        raise FeatureStoreError(
            f"--tls-cert {certificate} and --tls-key {key} are not a pair in PEM: {error}"
        ) from error


def _listening(
    host: str, port: int, tls_cert: Path | None, tls_key: Path | None, token_file: Path | None
) -> "Listening":
    """Read the tokens; warn of a certificate that has expired, or soon will."""
    from featurestore.console.files import problem_of_dates, read_tokens
    from featurestore.flight.server import Listening

    tls = read_tls(tls_cert, tls_key) if tls_cert and tls_key else None
    listening = Listening(host=host, port=port, tls=tls, tokens=read_tokens(token_file) if token_file else ())
    if tls_cert is not None and (problem := problem_of_dates(tls_cert)):
        print_warning(problem)
    return listening
