"""Import vectors that another network or modality made, into a feature store of their own."""

from typing import TYPE_CHECKING

import typer

from featurestore.console import commandline, output
from pipeline.options import ImportOptions, takes_on_cluster
from pipeline.problems import Problem

if TYPE_CHECKING:
    from pipeline.formats import VectorSource

EXAMPLES = """Examples:
  crossmedia import --from images.npy --keys ids.txt --source "our image encoder, v3"
  crossmedia import --from text.parquet --store data/features-text --name text --source "e5-base, titles"
  crossmedia import --from video.npy --keys video-ids.txt --store s3://shop/features-video --name video
  crossmedia import --from xdl-images --store data/features --dim 4096 -n 4
"""

app = commandline.CommandApp(report=True, rich_markup_mode="rich", stopped=commandline.CONTINUES)


@app.command(epilog=EXAMPLES)
@takes_on_cluster(ImportOptions)
def main(options: ImportOptions) -> None:
    """Import vectors that another network or modality made, into a feature store of their own.

    Rows need a key (int64) or an id (text, whose hash is the key, as for images). Bad rows are kept in the store's
    quarantine with the reason. Running it again imports changed vectors; a killed run continues.
    """
    from pipeline.cluster.tasks import connect
    from pipeline.import_vectors import import_vectors

    source = open_source(options)
    with connect() as client:
        summary = import_vectors(source, options, client)
    output.print_summary(str(summary))


def open_source(options: ImportOptions) -> "VectorSource":
    """Find the vectors to import. Raises VectorImportError, and typer.BadParameter for options that do not fit."""
    from pipeline import formats

    address = options.address
    if address.endswith(".npy") != (options.keys is not None):
        raise typer.BadParameter(Problem.KEYS_OF_NO_MATRIX.of(), param_hint="--keys")
    if options.keys is not None:
        return formats.plan_matrix(address, options.keys)
    if address.endswith(".parquet") or not formats.looks_like(address):
        return formats.plan_parquet(address, options.dim, options.feature_column)
    return formats.plan_xdl(address, options.dim)


if __name__ == "__main__":
    commandline.run_app(app)
