"""Command reduce: a compact copy of a store, of the principal components of its rows, and what these keep."""

from typing import Annotated

import typer

from featurestore.commands.common import Version
from featurestore.commands.recode import show_remade
from featurestore.console.commandline import CommandApp
from featurestore.console.output import print_summary
from featurestore.console.progress import progress_bar
from featurestore.spec import SAMPLE_ROWS
from featurestore.text.dtypes import DType

app = CommandApp()


@app.command(
    epilog="Examples:\n\n"
    "- `python -m featurestore reduce data/features data/features-256 --dims 256`\n\n"
    "- `python -m featurestore reduce s3://bucket/features s3://bucket/features-512 --dims 512 --dtype int8`"
)
def reduce(
    source: Annotated[str, typer.Argument(metavar="STORE", help="Folder or s3:// address of the store.")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="Where the compact store goes.")],
    dims: Annotated[int, typer.Option("--dims", min=1, help="Numbers of a row in the compact store.")],
    dtype: Annotated[
        DType | None, typer.Option("--dtype", help="What it keeps.", show_default="the store's; bfloat16 for int8")
    ] = None,
    sample: Annotated[
        int, typer.Option("--sample", min=1, help="Random rows to take the ranges of int8 from.")
    ] = SAMPLE_ROWS,
    version: Version = None,
) -> None:
    """Make a compact store of another: each row becomes its coordinates along the principal components of all rows.

    Says what these keep: variance, relative error, angles, nearest neighbours. The basis is a file of the new store;
    extract_features.py --reduce OUT makes rows by it, and refresh_features.py knows it. After an interruption the same
    command continues with the rows.
    """
    from featurestore.store import FeatureStore
    from featurestore.upkeep.remake.reduce import reduce as reduce_store

    store = FeatureStore.open(source)
    number = store.snapshot(version).version if isinstance(version, str) else version
    with progress_bar("shards, each twice") as progress:
        report = reduce_store(store, target, dims, dtype, version=number, sample_rows=sample, progress=progress)
    show_remade(
        report,
        {
            "numbers of a row": (f"{report.source_dim:,}", f"{report.dim:,}"),
            "bytes of a row": ("1", f"{report.row_bytes_share:.4f}"),
        },
        {"variance kept": f"{report.variance_kept:.4%}"},
    )
    print_summary(f"next: python -m trainer.plan --store {target} predicts bytes and time of a step with it")
