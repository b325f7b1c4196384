"""ID tables: vectors of IDs, sharded over the ranks, as sources of the exchange.

The rows of all tables of one width lie in one piece of memory, and a step of the optimiser moves all of them at once.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from featurestore.keys import (
    owner_of,
)
from featurestore.lookup.ondevice import on_device
from trainer.exchange.routing import Int64, unique_below
from trainer.ids.optimizers import RowOptimizer
from trainer.ids.shards import IdRows, TableShape, TableShards, owned_rows
from trainer.optim import Rates
from trainer.schema.profile import DistinctCount


@dataclass(frozen=True, eq=False)
class TakenRows:
    """Copies of rows that one step of training reads and moves, of several tables one after the other."""

    counts: Mapping[str, int]
    rows_Q: Tensor
    """By place in `SharedRows`."""
    rows: IdRows

    def of_tables(self, tables: Sequence[str]) -> "TakenRows":
        """Return the rows of these tables alone."""
        if list(tables) == list(self.counts):
            return self
        starts = dict(zip(self.counts, np.cumsum([0, *self.counts.values()]).tolist(), strict=False))
        pieces = [slice(starts[table], starts[table] + self.counts[table]) for table in tables]
        block_QW = torch.cat([self.rows.block_NW[piece] for piece in pieces])
        rows = IdRows(block_QW, self.rows.width, self.rows.state)
        counts = {table: self.counts[table] for table in tables}
        return TakenRows(counts, torch.cat([self.rows_Q[piece] for piece in pieces]), rows)


class SharedRows:
    """Rows of all tables of one width, read and moved together.

    What several tables expect to read is read at once, and a step moves it at once: a few operations on all rows
    instead of as many for each table.
    """

    def __init__(self, rows: IdRows, optimizer: RowOptimizer) -> None:
        self.rows, self._optimizer = rows, optimizer
        self._expected: dict[str, Tensor] = {}
        self._read: dict[str, Tensor] = {}
        self._taken: dict[str, TakenRows] = {}
        """What `read` has copied last in training, by each of its tables."""

    def expect(self, table: str, rows_Q: Tensor) -> None:
        """Prepare for `read`, which comes next, of these rows, before any of them changes."""
        self._expected[table] = rows_Q
        self._read.pop(table, None)

    def expects(self, table: str) -> bool:
        """Return whether `expect` was called for the next `read`."""
        return table in self._expected or table in self._read

    def read(self, table: str) -> Tensor:
        """Copy the weights (Q, V) as they are now, or averages, of the rows that were expected."""
        if table in self._expected:
            counts = {name: len(rows_Q) for name, rows_Q in self._expected.items()}
            rows_Q = torch.cat(list(self._expected.values()))
            rows = self.rows.take(rows_Q)
            every = self._optimizer.read(rows).contiguous()
            self._read |= dict(zip(counts, torch.split(every, list(counts.values())), strict=True))
            self._expected = {}
            if torch.is_grad_enabled():
                self._taken |= dict.fromkeys(counts, TakenRows(counts, rows_Q, rows))
        return self._read.pop(table)

    def move(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], rates: Rates) -> None:
        """Step the optimiser on the rows last read of these tables, by their weights then and gradients (Q, V)."""
        for read in dict.fromkeys(self._taken[table] for table in weights):
            tables = [table for table in read.counts if table in weights and self._taken[table] is read]
            taken = read.of_tables(tables)
            weight_QV, gradient_QV = (torch.cat([each[table] for table in tables]) for each in (weights, gradients))
            self._optimizer.step(taken.rows, weight_QV, gradient_QV, rates)
            self.rows.put(taken.rows_Q, taken.rows)
        self._taken = {}


@dataclass
class RowRequest:
    """Unique local rows (Q,), ascending, and for each of R ids asked its place among them."""

    rows_Q: Tensor
    inverse_R: Int64
    num_unique: int


class IdTable(TableShards):
    """The shards of one table that this rank owns; a rank beyond the number of shards owns none."""

    def __init__(
        self,
        shape: TableShape,
        rank: int,
        num_ranks: int,
        *,
        seed: int,
        scale: float,
        optimizer: RowOptimizer,
        shared: SharedRows,
        first_row: int,
    ) -> None:
        """Use `build_tables`. `shared` has room for this table from `first_row` on."""
        rows = shared.rows.narrow(first_row, owned_rows(shape, rank, num_ranks))
        super().__init__(shape, rank, num_ranks, seed=seed, scale=scale, optimizer=optimizer, rows=rows)
        self.width, self.shared, self._first_row = shape.width, shared, first_row
        self._leaf_QV: Tensor | None = None
        """What `vectors` has last returned in training."""
        self.seen = DistinctCount()
        """Different ids that this rank has served in training."""

    def owner_of(self, ids_U: Int64) -> Int64:
        """Find the rank that has the row of each id."""
        return owner_of(self.shape.shards_of(ids_U), self._num_ranks)

    def serve(self, ids_R: Int64, kind: str = "step") -> RowRequest:
        """Find the unique rows behind ids that this rank owns; two ids of one row get the same. Reads no weight.

        The ids of a training step, which comes in the order of steps, are noted in `seen`.
        """
        if kind == "step":
            self.seen = self.seen.with_values(ids_R)
        shard_R, row_R = self.shape.place_of(ids_R)
        slot_R = self._slot_of_shard[shard_R]
        assert (slot_R >= 0).all(), f"table {self.shape.name}: asked for rows that another rank owns"
        num_rows = len(self.shards) * self.shape.rows_per_shard
        rows_Q, inverse_R = unique_below(slot_R * self.shape.rows_per_shard + row_R, num_rows)
        return RowRequest(on_device(rows_Q, self.rows.weight.device), inverse_R, len(rows_Q))

    def expect(self, request: RowRequest) -> None:
        """Prepare for `vectors`, which comes next: tables that share memory are read at once."""
        self.shared.expect(self.shape.name, request.rows_Q + self._first_row)

    def vectors(self, request: RowRequest) -> Tensor:
        """Return the rows (Q, V) as an autograd leaf; `take_gradients` hands out what has gathered in its `.grad`."""
        if not self.shared.expects(self.shape.name):
            self.expect(request)
        rows_QV = self.shared.read(self.shape.name)
        if torch.is_grad_enabled():
            self._leaf_QV = rows_QV.requires_grad_()
        return rows_QV

    def release(self, request: RowRequest) -> None:
        """Do nothing: there is nothing to give back."""

    def tally(self) -> dict[str, int]:
        """Return this rank's counts besides `seen`, to be summed over ranks."""
        return {}

    def take_gradients(self) -> tuple[Tensor, Tensor] | None:
        """Give once what the last `vectors` returned in training and its gradients (Q, V), if there are any."""
        leaf_QV, self._leaf_QV = self._leaf_QV, None
        if leaf_QV is None or leaf_QV.grad is None or len(leaf_QV) == 0:
            return None
        return leaf_QV.detach(), leaf_QV.grad


def apply_gradients(tables: Iterable[IdTable], optimizer: RowOptimizer, rates: Rates) -> None:
    """Step the optimiser on the rows of every table's last `vectors`, and on no others. Every rank calls it."""
    weights: dict[SharedRows, dict[str, Tensor]] = {}
    gradients: dict[SharedRows, dict[str, Tensor]] = {}
    for table in tables:
        if (moved := table.take_gradients()) is not None:
            for found, values_QV in zip((weights, gradients), moved, strict=True):
                found.setdefault(table.shared, {})[table.shape.name] = values_QV
    for shared, weights_of in weights.items():
        shared.move(weights_of, gradients[shared], rates)
    optimizer.end_step(rates)
