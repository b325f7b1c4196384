"""Figures of the ids in each ID table, over all ranks: for report.json, TensorBoard and warnings.

Each owner notes the ids that it serves in training; together they know the same of a table for any number of ranks.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trainer.comm import Comm
from trainer.ids.collisions import Collisions, collisions_of
from trainer.ids.exact import ExactShape
from trainer.ids.tables import IdTable
from trainer.schema.distinct import DistinctCount


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
        """The share of the ids served that got a cold row, which others share; None where none was served."""
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
