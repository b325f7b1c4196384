"""Figures of ID tables: rows in use, and ids that share one with others."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from trainer.comm import Comm
from trainer.ids.exact import ExactShape
from trainer.ids.shards import TableShape
from trainer.ids.tables import IdTable

Figures = dict[str, Any]
"""Of one table, as report.json has them."""
WARNED_SHARE = 0.25
"""Of the ids of a table: where more of them share a row, the run warns; with four rows for each id 22 % do."""
_GOOD_SHARE = 0.01
_MOST_ROWS = 10**12  # of the configuration


def gather_figures(comm: Comm, tables: Mapping[str, IdTable]) -> dict[str, Figures]:
    """Gather the figures of the tables of all ranks; every rank calls it."""
    own = {name: table.tally() for name, table in tables.items()}
    everyone = comm.allgather_object(own, name="tables")
    return {
        name: figures_of(table.shape, sum((Counter(each[name]) for each in everyone), Counter[str]()))
        for name, table in tables.items()
    }


def figures_of(shape: TableShape, tally: Mapping[str, int]) -> Figures:
    """Return the figures of a table of which all ranks together have this tally.

    `share` is the part of the ids that share a row with another one. In a hashed table any row is as likely, so it is
    that of the rows that others use. In an exact one it is the part of the ids served that got the cold row.
    """
    if isinstance(shape, ExactShape):
        counts = {name: tally.get(name, 0) for name in ("used_rows", "served", "cold", "refused", "evicted", "expired")}
        share = counts["cold"] / counts["served"] if counts["served"] else None
        return {"kind": "exact", "rows": shape.num_rows, **counts, "share": share}
    used = tally.get("used_rows", 0)
    share = (used - 1) / shape.size if used else None
    return {"kind": "hashed", "rows": shape.size, "used_rows": used, "share": share}


def warning_of(name: str, figures: Figures) -> str | None:
    """Warn in one line, with the way out, where too many ids share a row, or have none of their own for long."""
    rows, used = figures["rows"], figures["used_rows"]
    if figures["kind"] == "hashed":
        if not used or figures["share"] <= WARNED_SHARE:
            return None
        ids = num_ids(rows, used)
        needed = rows_for(ids)
        more = f"model.tables.{name}={needed} would bring that under {_GOOD_SHARE:.0%}" if needed else ""
        return (
            f"table {name}: about {figures['share']:.0%} of its ids share one of its {rows:,} rows with another id; "
            f"{more or 'no table is as long'}; a row for each: model.tables.{name}={{kind: exact, max_rows: {2 * ids}}}"
        )
    if figures["evicted"] > rows:
        what = f"{figures['evicted']:,} rows made room for other ids, so few are trained for long"
    elif figures["refused"]:
        what = f"{figures['refused']:,} times an id stayed at the cold row because its shard was full"
    else:
        return None
    return (
        f"table {name}: {what}, with {used:,} of {rows:,} rows in use; raise model.tables.{name}.max_rows, or set a "
        "smaller expire_days, a larger admit_after or when_full=refuse"
    )


def num_ids(rows: int, used_rows: int) -> int:
    """Estimate how many different ids use `used_rows` of the rows of a hashed table, at least if they use all.

    Of m rows n ids leave m (1 - 1/m)^n empty (linear counting: Whang et al., "A linear-time probabilistic counting
    algorithm for database applications", 1990).
    """
    empty = max(rows - used_rows, 0.5)
    return used_rows if rows == 1 else round(math.log(empty / rows) / math.log1p(-1 / rows))


def rows_for(num_ids: int, share: float = _GOOD_SHARE) -> int | None:
    """Find the rows, rounded up to three digits, of which at most `share` of the ids share one; None if too many."""
    if num_ids < 2:
        return 1
    exact = -1 / math.expm1(math.log1p(-share) / (num_ids - 1))
    unit = 10 ** max(0, math.floor(math.log10(exact)) - 2)
    rows = math.ceil(exact / unit) * unit
    return rows if rows <= _MOST_ROWS else None
