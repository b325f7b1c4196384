"""Rows of all tables of one width: what a step reads of them is copied once, moved there, and written back once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.ids.optimizers import RowOptimizer
from trainer.ids.rows import IdRows
from trainer.optim import Rates


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
