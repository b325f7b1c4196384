"""Command sql: a query over the live rows of a store, by DuckDB."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurestore.commands.common import At, Url, Version, chosen_snapshot
from featurestore.console.commandline import CommandApp
from featurestore.console.files import check_ending
from featurestore.console.output import figure, print_rows, print_summary

if TYPE_CHECKING:
    import pyarrow as pa

app = CommandApp()

_PRINTED = 100
_FEW = 8  # numbers of a list that are printed whole


@app.command(
    epilog="Examples:\n\n"
    '- `python -m featurestore sql data/features "select count(*), avg(width) from images"`\n\n'
    '- `python -m featurestore sql data/features "select key, uri from images where width < 64" --out small.csv`\n\n'
    '- `python -m featurestore sql data/features "select key, feature from images" --version 12 --out all.parquet`'
)
def sql(
    url: Url,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="One SELECT, as DuckDB understands it.")],
    version: Version = None,
    at: At = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the rows to NAME.parquet, NAME.csv or NAME.arrow instead.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Rows to print, 100 by default, or to write, by default all.")
    ] = None,
) -> None:
    """Ask a store in SQL. Tables: images (the live rows, features as lists of numbers), quarantine, snapshots, shards.

    Reads only the columns that the query needs. Needs DuckDB: pip install duckdb.
    """
    from featurestore.sql.files import ENDINGS, write_rows
    from featurestore.sql.query import sql_reader
    from featurestore.store import FeatureStore

    if out is not None:
        check_ending(out, "--out", *ENDINGS)
    store = FeatureStore.open(url)
    with sql_reader(store, chosen_snapshot(store, version, at), query) as reader:
        if out is None:
            _print(reader, limit or _PRINTED)
        else:
            count = write_rows(out, reader, limit)
            print_summary(f"wrote {count:,} rows to {out}")


def _print(reader: "pa.RecordBatchReader", limit: int) -> None:
    import pyarrow as pa

    rows = list(islice(_rows(reader), limit + 1))
    numbers = [
        field.name for field in reader.schema if pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
    ]
    print_rows(reader.schema.names, [list(map(_text, row)) for row in rows[:limit]], numbers)
    if len(rows) > limit:
        print_summary(f"these are the first {limit:,} rows: see --limit and --out")


def _rows(reader: "pa.RecordBatchReader") -> Iterator[tuple[Any, ...]]:
    for batch in reader:
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return figure(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list) and len(value) > _FEW:
        return f"[{', '.join(map(_text, value[:_FEW]))}, … {len(value)}]"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return "" if value is None else str(value)
