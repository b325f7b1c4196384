"""Commands recode and reduce: a store made of another one."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from featurestore.commands.common import Version
from featurestore.console.commandline import CommandApp
from featurestore.console.output import print_summary, print_table, progress_bar, text_console
from featurestore.text import DType

if TYPE_CHECKING:
    from featurestore.upkeep.remake import RecodeReport, ReduceReport


app = CommandApp()


@app.command(epilog="Examples:\n\n- `python -m featurestore recode data/features data/features-half --dtype float16`")
def recode(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder or s3:// address of the store.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Where the new store goes.")],
    dtype: Annotated[DType, typer.Option("--dtype", help="What the new store keeps.")],
    version: Version = None,
) -> None:
    """Make a new store of another dtype, and measure what it keeps: relative error, angles, nearest neighbours.

    After an interruption the same command continues where it stopped.
    """
    from featurestore.store import FeatureStore
    from featurestore.upkeep.remake import recode as recode_store

    store = FeatureStore.open(source)
    number = store.snapshot(version).version if isinstance(version, str) else version
    with progress_bar("shards") as progress:
        report = recode_store(store, target, dtype, version=number, progress=progress)
    show_remade(report, {}, {})


def show_remade(
    report: "RecodeReport | ReduceReport", sizes: Mapping[str, tuple[str, str]], kept: Mapping[str, str]
) -> None:
    """Print what two stores have, the one that was there and the one made of it, and what the rows kept.

    `sizes` and `kept` are more rows of the table: of both stores, and of the new one."""
    table = Table("")
    for dtype_name in (report.source_dtype, report.dtype):
        table.add_column(dtype_name, justify="right")
    for name, (before, after) in sizes.items():
        table.add_row(name, before, after)
    table.add_row("rows", f"{report.num_rows:,}", f"{report.num_rows:,}")
    table.add_row("bytes", f"{report.source_bytes:,}", f"{report.bytes:,}")
    for name, value in {
        **kept,
        "relative error, mean": _shown(report.relative_error_mean),
        "relative error, 99 % of rows below": _shown(report.relative_error_p99),
        "cosine, mean": _shown(report.cosine_mean),
        "cosine, least": _shown(report.cosine_min),
        "10 nearest neighbours found again": _shown(report.recall_at_10),
    }.items():
        table.add_row(name, "", value)
    console = text_console()
    print_table(console, table)
    console.print(
        f"snapshot {report.source_version} of {report.source}; compared {report.num_compared:,} rows,"
        f" {report.num_queries:,} of them as queries"
    )


def _shown(value: float | None) -> str:
    return "too few rows" if value is None else f"{value:.6f}"


@app.command(
    epilog="Examples:\n\n"
    "- `python -m featurestore reduce data/features data/features-256 --dims 256`\n\n"
    "- `python -m featurestore reduce s3://bucket/features s3://bucket/features-512 --dims 512 --dtype float16`"
)
def reduce(
    source: Annotated[str, typer.Argument(metavar="STORE", help="Folder or s3:// address of the store.")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="Where the compact store goes.")],
    dims: Annotated[int, typer.Option("--dims", min=1, help="Numbers of a row in the compact store.")],
    dtype: Annotated[DType | None, typer.Option("--dtype", help="What it keeps.", show_default="the store's")] = None,
    version: Version = None,
) -> None:
    """Make a compact store of another: each row becomes its coordinates along the principal components of all rows.

    Says what these keep: variance, relative error, angles, nearest neighbours. The basis is a file of the new store;
    extract_features.py --reduce OUT makes rows by it, and refresh_features.py knows it. After an interruption the same
    command continues with the rows.
    """
    from featurestore.store import FeatureStore
    from featurestore.upkeep.remake import reduce as reduce_store

    store = FeatureStore.open(source)
    number = store.snapshot(version).version if isinstance(version, str) else version
    with progress_bar("shards, each twice") as progress:
        report = reduce_store(store, target, dims, dtype, version=number, progress=progress)
    show_remade(
        report,
        {
            "numbers of a row": (f"{report.source_dim:,}", f"{report.dim:,}"),
            "bytes of a row": ("1", f"{report.row_bytes_share:.4f}"),
        },
        {"variance kept": f"{report.variance_kept:.4%}"},
    )
    print_summary(f"next: python -m trainer.plan --store {target} predicts bytes and time of a step with it")
