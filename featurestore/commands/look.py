"""Commands info, get, quarantine and serve: the contents of a store, here and for other processes over Arrow Flight."""

import ssl
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featurestore.commands import Url, Version, open_store
from featurestore.console import commandline, output
from featurestore.errors import FeatureStoreError
from featurestore.problems import Problem
from featurestore.text import refusal

if TYPE_CHECKING:
    from featurestore.flight.server import Listening
    from featurestore.keys import Float32Array
    from featurestore.store import FeatureStore

app = commandline.CommandApp()


@app.command(epilog="Example: `crossmedia store info data/features`")
def info(url: Url, version: Version = None) -> None:
    """Show the contents of a store."""
    from featurestore.log import utc_text
    from featurestore.published.versions import read_channels

    store = open_store(url)
    snapshot = store.snapshot(version)
    channels = ", ".join(f"{move.channel} at {move.version}" for move in read_channels(store.storage))
    manifest = snapshot.manifest
    extractor = store.info.extractor.model_dump(exclude={"int8"}) | {"compute_dtype": store.info.extractor.precision}
    lines = {
        "store": store.url,
        "feature": store.info.name,
        "dim": store.info.width_text,
        "dtype": store.info.dtype,
        "snapshot": f"{snapshot.version} ({manifest.operation})",
        "committed": utc_text(manifest.time_s) if snapshot.version else "never",
        "rows": f"{snapshot.num_rows:,}",
        "shards": f"{store.info.num_shards} ({len(manifest.shards)} with files)",
        "files": f"{manifest.num_files:,}",
        "bytes": f"{manifest.file_bytes:,}",
        "quarantined": f"{len(store.quarantine_rows()):,}",
        **({"channels": channels} if channels else {}),
        **_basis_lines(store),
        **{f"extractor {name}": value for name, value in extractor.items()},
    }
    for name, value in lines.items():
        sys.stdout.write(f"{name:<24} {value}\n")


@app.command(
    epilog="Examples:\n\n"
    "- `crossmedia store get data/features -7079617629412041231`\n\n"
    "- `crossmedia store get data/features --uri shirts/1.jpg --out shirt.npy`",
    context_settings={"ignore_unknown_options": True},  # half of all keys are negative, and look like options
)
def get(
    url: Url,
    keys: Annotated[list[int] | None, typer.Argument(metavar="[KEY]...", help="Keys of images.")] = None,
    uri: Annotated[list[str] | None, typer.Option("--uri", help="Uri of an image, instead of its key.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write NAME.npy, (keys, dim).")] = None,
    version: Version = None,
) -> None:
    """Fetch the features of images, as float32: printed, or written to a file."""
    if not keys and not uri:
        raise typer.BadParameter(Problem.NO_IMAGE_NAMED.of())
    import numpy as np

    from featurestore.keys import keys_of_uris

    wanted_U = np.concatenate([np.asarray(keys or [], dtype=np.int64), keys_of_uris(uri or [])])
    store = open_store(url)
    values_UD = store.codec.decode(store.snapshot(version).get(wanted_U))
    if out is not None:
        _write(out, values_UD)
        return
    for key, row_D in zip(wanted_U, values_UD, strict=True):
        sys.stdout.write(f"{key}: {' '.join(f'{value:.6g}' for value in row_D)}\n")


@app.command(epilog="Example: `crossmedia store quarantine data/features`")
def quarantine(url: Url) -> None:
    """List the images that could not be read or decoded, with the reason of each; a refresh tries them again."""
    from featurestore.log import utc_text

    rows = sorted(open_store(url).quarantine_rows(), key=lambda row: row.uri)
    output.print_rows(
        ["key", "uri", "since", "reason"],
        [(str(row.key), row.uri, utc_text(row.time_s), row.reason) for row in rows],
        numbers=["key"],
    )


def _basis_lines(store: "FeatureStore") -> dict[str, str]:
    """Describe the basis of a compact store's rows; nothing of others."""
    if (basis := store.basis) is None or store.info.reduction is None:
        return {}
    origin = basis.origin
    return {
        "reduced from": f"snapshot {origin.version} of store {origin.store_id}, {origin.num_rows:,} rows",
        "variance kept": f"{basis.variance_kept:.4%}",
        "basis": store.info.reduction.sha256,
    }


def _write(path: Path, values_UD: "Float32Array") -> None:
    import numpy as np

    from featurestore.console.files import replaced_file

    try:
        with replaced_file(path) as part, part.open("wb") as file:
            np.save(file, values_UD)
    except OSError as error:
        raise FeatureStoreError(Problem.REFUSED, "write", path, refusal(error)) from error


@app.command(
    epilog="Examples:\n\n"
    "- `crossmedia store serve data/features --port 8815`\n\n"
    "- `crossmedia store serve s3://bucket/features --host 0.0.0.0 --port 8815"
    " --tls-cert server.pem --tls-key server.key --token-file tokens.txt`"
)
def serve(
    url: Url,
    host: Annotated[str, typer.Option("--host", help="Address to listen at; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen at; 0 takes a free one.")
    ] = 8815,
    version: Version = None,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", help="Certificate of the server, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="Key of the certificate, PEM.")] = None,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="File of tokens, one a line; a client needs one of them.")
    ] = None,
    cache_dir: Annotated[Path | None, typer.Option("--cache-dir", help="Folder for the local cache of shards.")] = None,
    poll_s: Annotated[
        float, typer.Option("--poll-s", min=0.1, help="Seconds between looks for a new snapshot.")
    ] = 10.0,
) -> None:
    """Answer lookups over Arrow Flight: keys in, features and a mask out. `featurestore.connect` is the client.

    Prints its address when it answers. It offers newer snapshots as they are committed; with --version that one alone,
    or that of a channel, wherever it is moved. SIGTERM ends it.
    """
    from featurestore.console.memory import bound_freed_memory
    from featurestore.flight.server import BLOCK_BYTES, OpenSnapshots
    from featurestore.flight.server import serve as serve_store

    if (tls_cert is None) != (tls_key is None):
        raise typer.BadParameter(Problem.TLS_HALF_GIVEN.of())
    bound_freed_memory(2 * BLOCK_BYTES)
    store = open_store(url)
    listening = _listening(host, port, tls_cert, tls_key, token_file)
    with output.progress_bar("shards") as progress:
        snapshots = OpenSnapshots(store, version=version, cache_dir=cache_dir, progress=progress)
    serve_store(snapshots, listening, poll_s, output.print_summary)


def read_tls(certificate: Path, key: Path) -> tuple[str, str]:
    """Read certificate and key of a server, PEM. Raises FeatureStoreError where they do not fit."""
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
        return certificate.read_text(), key.read_text()
    except (OSError, UnicodeDecodeError) as error:  # ssl.SSLError is an OSError
        raise FeatureStoreError(Problem.TLS_NOT_A_PAIR, certificate, key, error) from error


def _listening(
    host: str, port: int, tls_cert: Path | None, tls_key: Path | None, token_file: Path | None
) -> "Listening":
    """Read the tokens; warn of a certificate that has expired, or soon will."""
    from featurestore.console.files import problem_of_dates, read_tokens
    from featurestore.flight.server import Listening

    tls = read_tls(tls_cert, tls_key) if tls_cert and tls_key else None
    listening = Listening(host=host, port=port, tls=tls, tokens=read_tokens(token_file) if token_file else ())
    if tls_cert is not None and (problem := problem_of_dates(tls_cert)):
        output.print_warning(problem)
    return listening
