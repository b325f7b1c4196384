"""Import vectors that another network or modality made, into a feature store of their own."""

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from featurestore.console.commandline import CONTINUES, CommandApp, power_of_two, run_app

if TYPE_CHECKING:
    from pipeline.vectors.source import VectorSource

EXAMPLES = """Examples:

\b
python jobs/import_features.py --from images.npy --keys ids.txt --source "our image encoder, v3"
python jobs/import_features.py --from text.parquet --store data/features-text --name text --source "e5-base, titles"
python jobs/import_features.py --from video.npy --keys video-ids.txt --store s3://shop/features-video --name video
dask-submit -n 4 jobs/import_features.py --from xdl-images --store data/features --dim 4096
"""
Format = Literal["auto", "parquet", "npy", "xdl"]
BinaryDType = Literal["bfloat16", "float16", "float32"]
DTypeOption = Annotated[
    Literal["bfloat16", "float16", "float32", "int8"] | None,
    typer.Option(
        help="In which the store keeps features; int8 only where the store is that already.",
        show_default="the store's; bfloat16 in a new one",
    ),
]

app = CommandApp(rich_markup_mode="rich", stopped=CONTINUES)


@app.command(epilog=EXAMPLES)
def main(
    address: Annotated[
        str,
        typer.Option(
            "--from",
            help="A .parquet file or a folder of them, a .npy matrix, or a folder of XDL's data.0, data.1 …",
        ),
    ],
    store: Annotated[str, typer.Option(help="Folder or address of the feature store; made when it is new.")] = (
        "data/features"
    ),
    name: Annotated[str | None, typer.Option(help="Of the feature, in a new store.", show_default="feature")] = None,
    origin: Annotated[
        str | None, typer.Option("--source", help="What made the vectors, in words; another one is refused later.")
    ] = None,
    file_format: Annotated[Format, typer.Option("--format", help="auto goes by the names of the files.")] = "auto",
    keys: Annotated[str | None, typer.Option(help="Of a .npy matrix: .npy of int64, or a text file of ids.")] = None,
    dim: Annotated[
        int | None, typer.Option(min=1, help="Numbers per vector, for XDL and for lists.", show_default="4096 for XDL")
    ] = None,
    feature_column: Annotated[str | None, typer.Option(help="Of Parquet.", show_default="the only one")] = None,
    binary_dtype: Annotated[
        BinaryDType | None, typer.Option(help="Of fixed-size binary in Parquet; bfloat16 for uint16 bits in .npy.")
    ] = None,
    dtype: DTypeOption = None,
    num_shards: Annotated[
        int | None,
        typer.Option(
            min=1, max=65536, callback=power_of_two, help="Of a new store, a power of two.", show_default="64"
        ),
    ] = None,
    part_size: Annotated[int | None, typer.Option(min=1, help="Rows per task.", show_default="32 MB of them")] = None,
    keep_missing: Annotated[
        bool, typer.Option("--keep-missing/--drop-missing", help="Rows of the store that the source does not have.")
    ] = True,
    max_gone: Annotated[float, typer.Option(min=0, max=1, help="Share of the store that --drop-missing may drop.")] = (
        0.5
    ),
) -> None:
    """Import vectors that another network or modality made, into a feature store of their own.

    Rows need a key (int64) or an id (text, whose hash is the key, as for images). Bad rows are kept in the store's
    quarantine with the reason. Running it again imports what has changed; a killed run continues.
    """
    from pipeline.cluster.connect import connect
    from pipeline.vectors.import_vectors import ImportOptions, import_vectors

    options = ImportOptions(
        store=store,
        name=name,
        dtype=dtype,
        num_shards=num_shards,
        origin=origin,
        part_size=part_size,
        keep_missing=keep_missing,
        max_gone=max_gone,
    )
    source = open_source(address, file_format, keys, dim, feature_column, binary_dtype)
    with connect() as client:
        summary = import_vectors(source, options, client)
    typer.echo(summary)


def open_source(
    address: str,
    file_format: Format,
    keys: str | None,
    dim: int | None,
    feature_column: str | None,
    binary_dtype: BinaryDType | None,
) -> "VectorSource":
    """Find what is to be imported. Raises VectorImportError, and typer.BadParameter for options that do not fit."""
    from pipeline.vectors import matrix, parquet, xdl

    suffix = PurePosixPath(address).suffix
    if file_format == "auto":
        file_format = "npy" if suffix == ".npy" else "parquet" if suffix == ".parquet" else "auto"
    if (file_format == "npy") != (keys is not None):
        raise typer.BadParameter("a .npy matrix needs its keys, and no other format has any", param_hint="--keys")
    if file_format == "npy":
        return matrix.plan(address, str(keys), binary_dtype)
    if file_format == "parquet" or (file_format == "auto" and not xdl.looks_like(address)):
        return parquet.plan(address, dim, binary_dtype, feature_column)
    return xdl.plan(address, dim)


if __name__ == "__main__":
    run_app(app)
