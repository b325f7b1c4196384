"""Figures of ID tables: rows, collisions, memory.

Ids that training has met are noted in a fixed amount of memory.

Each owner notes the ids that it serves in training; together they know the same of a table for any number of ranks.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trainer.comm import Comm
from trainer.ids.exact import ExactShape
from trainer.ids.shards import TableShape
from trainer.ids.tables import IdTable
from trainer.schema.fields import DistinctCount

WARNED_SHARE = 0.25
"""Of the ids of a table: where more of them share a row, the run warns; with four rows for each id 22 % do."""
_GOOD_SHARE = 0.01
_MOST_ROWS = 10**12  # of the configuration


@dataclass(frozen=True)
class Collisions:
    """Figures of a hashed table: different ids that training has met, its rows, and those that these ids use."""

    ids: int
    rows: int
    used_rows: int
    share: float | None
    """Of the ids, those that share their row with another one; None before the first id."""
    is_exact: bool
    """Whether ids were few enough to be counted; else their number is an estimate and the others follow from it."""

    def as_report(self) -> dict[str, Any]:
        """Return the figures as report.json has them."""
        return {"kind": "hashed", **asdict(self)}

    def scalars(self) -> dict[str, float | None]:
        """Return what TensorBoard shows."""
        return {"collisions": self.share}

    def warning(self, name: str) -> str | None:
        """Warn in one line, with the way out, where too many ids share a row."""
        if self.share is None or self.share <= WARNED_SHARE:
            return None
        rows = rows_for(self.ids)
        more = f"model.tables.{name}={rows} would bring that under {_GOOD_SHARE:.0%}" if rows else "no table is as long"
        return (
            f"table {name}: {self.share:.0%} of {self.ids:,} different ids share one of its {self.rows:,} rows with "
            f"another id; {more}; a row for each: model.tables.{name}={{kind: exact, max_rows: {2 * self.ids}}}"
        )


def collisions_of(shape: TableShape, seen: DistinctCount) -> Collisions:
    """Measure a table that has met the ids of `seen`: counted up to some thousand ids, else what is to be expected.

    With n ids hashed evenly into m rows, an id is alone with probability (1 - 1/m)^(n - 1), and a row stays empty with
    (1 - 1/m)^n.
    """
    count, rows = seen.estimate, shape.size
    if seen.is_exact:
        ids_of_row = np.unique(shape.rows_of_hashes(seen.hashes_K), return_counts=True)[1]
        shared = float(ids_of_row[ids_of_row > 1].sum()) / count if count else None
        return Collisions(count, rows, len(ids_of_row), shared, True)
    return Collisions(count, rows, round(rows * _share(rows, count)), _share(rows, count - 1), False)


def rows_for(num_ids: int, share: float = _GOOD_SHARE) -> int | None:
    """Find the rows, rounded up to three digits, of which at most `share` of the ids share one; None if too many."""
    if num_ids < 2:
        return 1
    exact = -1 / math.expm1(math.log1p(-share) / (num_ids - 1))
    unit = 10 ** max(0, math.floor(math.log10(exact)) - 2)
    rows = math.ceil(exact / unit) * unit
    return rows if rows <= _MOST_ROWS else None


def _share(rows: int, others: int) -> float:
    """1 - (1 - 1 / rows) ^ others."""
    return float(others > 0) if rows == 1 else -math.expm1(others * math.log1p(-1 / rows))


@dataclass(frozen=True)
class ExactFigures:
    """Figures of the ids of an exact table.

    `ids`: different ids that training has met, counted where `is_exact`, else estimated. `rows`: in use, of `max_rows`.
    The others: see trainer/ids/exact.py, ExactCounts.
    """

    ids: int
    is_exact: bool
    rows: int
    max_rows: int
    served: int
    cold: int
    refused: int
    evicted: int
    expired: int

    @property
    def share(self) -> float | None:
        """The share of the served ids that got a cold row, which others share; None if none was served."""
        return self.cold / self.served if self.served else None

    def as_report(self) -> dict[str, Any]:
        """Return the figures as report.json has them."""
        return {"kind": "exact", **asdict(self), "share": self.share}

    def scalars(self) -> dict[str, float | None]:
        """Return what TensorBoard shows."""
        return {"rows": self.rows, "cold_share": self.share, "evicted": self.evicted}

    def warning(self, name: str) -> str | None:
        """Warn in one line, with the way out, where a shard was full of rows in use, or more made room than fit."""
        if self.evicted > self.max_rows:
            what = f"{self.evicted:,} rows made room for other ids, so few are trained for long"
        elif self.refused:
            what = f"{self.refused:,} times an id stayed at the cold row because its shard was full"
        else:
            return None
        return (
            f"table {name}: {what}, with {self.rows:,} of {self.max_rows:,} rows in use; raise "
            f"model.tables.{name}.max_rows, or set a smaller expire_days, a larger admit_after or when_full=refuse"
        )


TableFigures = Collisions | ExactFigures


def gather_figures(comm: Comm, tables: Mapping[str, IdTable]) -> dict[str, TableFigures]:
    """Gather by table what all ranks have served since the run, or its resumption, began; every rank calls it."""
    own = {name: (table.seen.hashes_K, table.tally()) for name, table in tables.items()}
    everyone = comm.allgather_object(own, name="tables")
    found: dict[str, TableFigures] = {}
    for name, table in tables.items():
        seen, tally = DistinctCount(), Counter[str]()
        for hashes_K, counts in (each[name] for each in everyone):
            seen = seen.merged(DistinctCount(hashes_K))
            tally.update(counts)
        if isinstance(table.shape, ExactShape):
            found[name] = ExactFigures(seen.estimate, seen.is_exact, max_rows=table.shape.num_rows, **tally)
        else:
            found[name] = collisions_of(table.shape, seen)
    return found
