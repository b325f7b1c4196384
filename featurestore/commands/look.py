"""Commands info, get and quarantine: the contents of a store, and the images that it could not import."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from featurestore.commands.common import At, Url, Version, chosen_snapshot
from featurestore.console.commandline import CommandApp
from featurestore.console.output import print_rows
from featurestore.errors import FeatureStoreError
from featurestore.text import refusal

if TYPE_CHECKING:
    from featurestore.store import FeatureStore

app = CommandApp()


@app.command(epilog="Example: `python -m featurestore info data/features`")
def info(url: Url, version: Version = None, at: At = None) -> None:
    """Show the contents of a store."""
    from featurestore.log import utc_text
    from featurestore.store import FeatureStore

    store = FeatureStore.open(url)
    snapshot = chosen_snapshot(store, version, at)
    manifest = snapshot.manifest
    extractor = store.info.extractor.model_dump()
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
        **_channel_lines(store),
        **_basis_lines(store),
        **{f"extractor {name}": value for name, value in extractor.items()},
    }
    for name, value in lines.items():
        sys.stdout.write(f"{name:<24} {value}\n")


@app.command(
    epilog="Examples:\n\n"
    "- `python -m featurestore get data/features -7079617629412041231`\n\n"
    "- `python -m featurestore get data/features --uri shirts/1.jpg --out shirt.npy`\n\n"
    "- `python -m featurestore get data/features --uri shirts/1.jpg --out shirt.arrow`",
    context_settings={"ignore_unknown_options": True},  # half of all keys are negative, and look like options
)
def get(
    url: Url,
    keys: Annotated[list[int] | None, typer.Argument(metavar="[KEY]...", help="Keys of images.")] = None,
    uri: Annotated[list[str] | None, typer.Option("--uri", help="Uri of an image, instead of its key.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write NAME.npy (keys, dim), or NAME.arrow (key, feature as a tensor)."),
    ] = None,
    version: Version = None,
    at: At = None,
) -> None:
    """Fetch the features of images, as float32: printed, or written to a file."""
    if not keys and not uri:
        raise typer.BadParameter("name a KEY or --uri")
    from featurestore.keys import keys_of_uris
    from featurestore.store import FeatureStore

    wanted_U = np.concatenate([np.asarray(keys or [], dtype=np.int64), keys_of_uris(uri or [])])
    store = FeatureStore.open(url)
    values_UD = store.codec.decode(chosen_snapshot(store, version, at).get(wanted_U))
    if out is not None:
        _write(out, wanted_U, values_UD)
        return
    for key, row_D in zip(wanted_U, values_UD, strict=True):
        sys.stdout.write(f"{key}: {' '.join(f'{value:.6g}' for value in row_D)}\n")


@app.command(epilog="Example: `python -m featurestore quarantine data/features`")
def quarantine(url: Url) -> None:
    """List the images that could not be read or decoded, with the reason of each; a refresh tries them again."""
    from featurestore.log import utc_text
    from featurestore.store import FeatureStore

    rows = sorted(FeatureStore.open(url).quarantine_rows(), key=lambda row: row.uri)
    print_rows(
        ["key", "uri", "since", "reason"],
        [(str(row.key), row.uri, utc_text(row.time_s), row.reason) for row in rows],
        numbers=["key"],
    )


def _channel_lines(store: "FeatureStore") -> dict[str, str]:
    from featurestore.published.channels import read_channels

    moves = read_channels(store.storage)
    return {"channels": ", ".join(f"{move.channel} at {move.version}" for move in moves)} if moves else {}


def _basis_lines(store: "FeatureStore") -> dict[str, str]:
    """Say what the rows of a compact store are coordinates in; nothing of others."""
    if (basis := store.basis) is None or store.info.reduction is None:
        return {}
    origin = basis.origin
    return {
        "reduced from": f"snapshot {origin.version} of store {origin.store_id}, {origin.num_rows:,} rows",
        "variance kept": f"{basis.variance_kept:.4%}",
        "basis": store.info.reduction.sha256,
    }


def _write(path: Path, keys_U: npt.NDArray[np.int64], values_UD: npt.NDArray[np.float32]) -> None:
    import pyarrow as pa

    from featurestore.console.files import replaced_file

    try:
        with replaced_file(path) as part, part.open("wb") as file:
            if path.suffix != ".arrow":
                np.save(file, values_UD)
                return
            feature: Any = pa.FixedShapeTensorArray.from_numpy_ndarray(values_UD)
            table = pa.table({"key": pa.array(keys_U), "feature": feature})
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
    except OSError as error:
        raise FeatureStoreError(f"cannot write {path}: {refusal(error)}") from error
