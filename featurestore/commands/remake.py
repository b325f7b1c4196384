"""Command remake: a store made of another one."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from featurestore.commands.common import Version
from featurestore.console.commandline import CommandApp
from featurestore.console.output import print_summary, print_table, progress_bar, text_console
from featurestore.text import DType

if TYPE_CHECKING:
    from featurestore.upkeep.remake import RemakeReport


app = CommandApp()


@app.command(
    epilog="Examples:\n\n"
    "- `python -m featurestore remake data/features data/features-256 --dims 256`\n\n"
    "- `python -m featurestore remake s3://bucket/features s3://bucket/features-half --dtype float16`"
)
def remake(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder or s3:// address of the store.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Where the new store goes.")],
    dtype: Annotated[
        DType | None, typer.Option("--dtype", help="What the new store keeps.", show_default="the store's")
    ] = None,
    dims: Annotated[
        int | None,
        typer.Option("--dims", min=1, help="Principal components of a row to keep.", show_default="all its numbers"),
    ] = None,
    version: Version = None,
) -> None:
    """Make a new store of another: in another dtype, or of principal components, and measure what its rows keep.

    Says how large relative error and angles are, and how many nearest neighbours stay. With `--dims` the new store is
    compact: each row becomes its coordinates along the principal components of all rows. The basis is a file of the new
    store; extract_features.py --reduce OUT makes rows by it, and refresh_features.py knows it. After an interruption
    the same command continues with the rows.
    """
    from featurestore.store import FeatureStore
    from featurestore.upkeep.remake import remake as remake_store

    store = FeatureStore.open(source)
    number = store.snapshot(version).version if isinstance(version, str) else version
    with progress_bar("shards" if dims is None else "shards, each twice") as progress:
        report = remake_store(store, out, dims=dims, dtype=dtype, version=number, progress=progress)
    show_remade(report)
    if dims is not None:
        print_summary(f"next: python -m trainer.plan --store {out} predicts bytes and time of a step with it")


def show_remade(report: "RemakeReport") -> None:
    """Print what the two stores have, and what the rows keep."""
    table = Table("")
    for dtype_name in (report.source_dtype, report.dtype):
        table.add_column(dtype_name, justify="right")
    table.add_row("numbers of a row", f"{report.source_dim:,}", f"{report.dim:,}")
    table.add_row("bytes of a row", "1", f"{report.row_bytes_share:.4f}")
    table.add_row("rows", f"{report.num_rows:,}", f"{report.num_rows:,}")
    table.add_row("bytes", f"{report.source_bytes:,}", f"{report.bytes:,}")
    if report.variance_kept is not None:
        table.add_row("variance kept", "", f"{report.variance_kept:.4%}")
    kept = report.accuracy
    for name, value in {
        "relative error, mean": kept.relative_error_mean,
        "relative error, 99 % of rows below": kept.relative_error_p99,
        "cosine, mean": kept.cosine_mean,
        "cosine, least": kept.cosine_min,
        "10 nearest neighbours found again": kept.recall_at_10,
    }.items():
        table.add_row(name, "", "too few rows" if value is None else f"{value:.6f}")
    console = text_console()
    print_table(console, table)
    console.print(
        f"snapshot {report.source_version} of {report.source}; compared {kept.num_compared:,} rows,"
        f" {kept.num_queries:,} of them as queries"
    )
