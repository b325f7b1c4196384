"""Impressions of a log as rows to score: each with the behaviours before it, in the columns of samples.

Read and checked as `build_samples` reads logs, but in this process, and no row is left out: a bad one is an error.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.errors import naming
from featurestore.published.versions import open_published
from pipeline.errors import SampleError
from pipeline.problems import Problem
from pipeline.samples.added import options_of
from pipeline.samples.build import LogTables, latest_of, open_tables, rules_of
from pipeline.samples.groups import make_groups, no_rows, table_of_groups
from pipeline.samples.logs import BEHAVIORS, IMPRESSIONS, Columns, read_piece, with_joined_rows
from pipeline.samples.mapping import EVENT
from trainer.schema.profile import is_pandas, table_of

FILE = "rows.parquet"


def with_behaviors(impressions: Any, behaviors: Any, samples: str | Path = "data/samples") -> Any:
    """Make rows to score of a raw log: impressions, each with the user's behaviours before it, in their order.

    Both are tables as the logs that `samples` were made from; of a DataFrame of impressions the rows are a DataFrame
    with its index, else an Arrow table. Columns, window and user columns are those that `samples` were made with;
    labels, sessions and dwell times may be left out. The behaviours of an impression are those before itself, not
    before its session. Of events, every row of `impressions` is one, and every row of `behaviors` too unless these have
    the column that tells. Columns that both lack come from the tables that the mapping joins, as these are now. Raises
    SampleError for a row that a job would quarantine.
    """
    rows = _requests(table_of(impressions), table_of(behaviors), str(samples))
    return rows.to_pandas().set_index(impressions.index) if is_pandas(impressions) else rows


def _requests(impressions: pa.Table, behaviors: pa.Table, samples: str) -> pa.Table:
    options = options_of(open_published(samples))
    with (
        tempfile.TemporaryDirectory() as folder,
        open_tables(replace(options, logs=folder, samples=f"{folder}/samples"), options.logs) as tables,
    ):
        shown, user_columns, ad_columns = _read(tables, IMPRESSIONS, impressions, {"session": 0, "label": 0})
        done = no_rows(tables.layouts[BEHAVIORS])
        if behaviors.num_rows:
            done, _, _ = _read(tables, BEHAVIORS, behaviors, {"dwell_s": options.min_dwell_s, "label": 1})
            is_long_N = done.pop("dwell_s") >= options.min_dwell_s
            done = {name: values_N[is_long_N] for name, values_N in done.items()}
    shown["session"] = np.arange(impressions.num_rows)  # a group for each
    return table_of_groups(make_groups(shown, done, rules_of(options, None)), user_columns, ad_columns).sort_by(
        "session"
    )


def _read(
    tables: LogTables, log: str, table: pa.Table, filled: dict[str, float]
) -> tuple[Columns, tuple[str, ...], tuple[str, ...]]:
    """Read the rows of one log, and name its columns of users and of ads.

    `filled`: values of columns that are not there.
    """
    layout = tables.layouts[log].silent()
    if layout.where and (log == IMPRESSIONS or layout.names[EVENT] not in table.column_names):
        layout = layout.of_all_rows()
    for name, value in filled.items():
        written = layout.names.get(name)
        if written is not None and written not in table.column_names:
            table = table.append_column(written, pa.array(np.full(table.num_rows, value)))
    tables.layouts[log] = replace(layout, files=log)  # wherever their files are
    place = Path(tables.options.logs, log)
    place.mkdir()
    pq.write_table(table, place / FILE)
    with naming(str(place / FILE), f"the {log}"):
        pieces = with_joined_rows(tables.pieces(log), Path(tables.options.logs))
        parts = [read_piece(piece, latest_of(tables.options)) for piece in pieces]
    for part in parts:
        if part.bad_reason:
            raise SampleError(Problem.BAD_ROW, part.bad_row[0], log, part.bad_reason[0])
    columns = {name: np.concatenate([part.good[name] for part in parts]) for name in parts[0].good}
    return columns, pieces[0].layout.user_columns, pieces[0].layout.ad_columns
