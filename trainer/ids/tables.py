"""ID tables: vectors of IDs, sharded over the ranks, as sources of the exchange.

The rows of all tables of one width lie in one piece of memory: a step reads them at once and moves them at once, by a
few operations on all rows instead of as many for each table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from featurestore.keys import Int64Array, owned_shards, owner_of
from featurestore.lookup.ondevice import on_device
from trainer.errors import CheckpointError
from trainer.exchange.routing import unique_below
from trainer.ids.optimizers import RowOptimizer
from trainer.ids.shards import WEIGHT, IdRows, TableShape, initial_rows, owned_rows
from trainer.optim import Rates
from trainer.problems import Problem

LAST_WEIGHT = "last_weight"
"""Name in a checkpoint of the weights as the last step that touched the row left them, where `weight` is newer."""


@dataclass
class RowRequest:
    """Unique local rows (Q,), ascending, and for each of R ids asked its place among them."""

    rows_Q: Tensor
    inverse_R: Int64Array
    num_unique: int


class IdTable:
    """The shards of one table that this rank owns; a rank beyond the number of shards owns none."""

    def __init__(
        self, shape: TableShape, rank: int, num_ranks: int, *, seed: int, scale: float, source: "IdSource"
    ) -> None:
        """Use `build_tables`. The table takes the next free rows of `source`, and gives them first values."""
        self.shape, self._num_ranks, self.source = shape, num_ranks, source
        self._seed, self._scale, self.optimizer = seed, scale, source.optimizer
        self.shards = owned_shards(shape.num_shards, rank, num_ranks)
        self._slot_of_shard = np.full(shape.num_shards, -1, dtype=np.int64)
        self._slot_of_shard[self.shards] = np.arange(len(self.shards))
        self.first_row = source.num_taken
        source.num_taken += owned_rows(shape, rank, num_ranks)
        source.key_sources[shape.name] = self
        self.rows = source.rows[self.first_row : source.num_taken]
        self._fill()

    def owner_of(self, ids_U: Int64Array) -> Int64Array:
        """Find the rank that has the row of each id."""
        return owner_of(self.shape.shards_of(ids_U), self._num_ranks)

    def serve(self, ids_R: Int64Array, kind: str = "step") -> RowRequest:
        """Find the unique rows behind ids that this rank owns; two ids of one row get the same. Reads no weight."""
        shard_R, row_R = self.shape.place_of(ids_R)
        slot_R = self._slot_of_shard[shard_R]
        assert (slot_R >= 0).all(), f"table {self.shape.name}: asked for rows that another rank owns"
        num_rows = len(self.shards) * self.shape.rows_per_shard
        rows_Q, inverse_R = unique_below(slot_R * self.shape.rows_per_shard + row_R, num_rows)
        return RowRequest(on_device(rows_Q, self.rows.weight.device), inverse_R, len(rows_Q))

    def release(self, request: RowRequest) -> None:
        """Do nothing: there is nothing to give back."""

    def settle(self, request: RowRequest) -> Tensor:
        """Return the rows of the table that the step of this request reads, all different."""
        return request.rows_Q

    def of_ids(self, request: RowRequest, rows_UV: Tensor) -> Tensor:
        """Return the vector of each unique id of the request, of the rows that `settle` named."""
        return rows_UV

    def tally(self) -> dict[str, int]:
        """Count the rows that training has touched; what ranks count adds up to the table's."""
        return {"used_rows": int(self.rows.parts[self.optimizer.mark].count_nonzero())}

    def names(self) -> list[str]:
        """List names of the tensors that `import_shards` takes of a checkpoint: <table>/<shard>/<part>."""
        return list(self._kept())

    def export_shards(self) -> dict[str, Tensor]:
        """Return weights as they are now, and state of the owned shards, <table>/<shard>/<part>.

        They are to be written before the next step: views, but for weights that make up for steps that did not touch
        them; then the weights in memory are there too, as part last_weight.
        """
        exported = self._kept()
        if self.optimizer.lags:
            for slot, shard in enumerate(self.shards):
                exported[self._name(shard, WEIGHT)] = self.optimizer.current(self._of_slot(slot))
        return exported

    def import_shards(self, state: Mapping[str, Tensor]) -> None:
        """Take the owned shards out of `state`, which has all `names` and may have others. Raises CheckpointError."""
        for slot, shard in enumerate(self.shards):
            self._import(slot, {part: state[self._name(shard, part)] for part in self._kept_of(slot)})

    def _import(self, slot: int, parts: Mapping[str, Tensor]) -> None:
        """Make those parts the shard's. Raises CheckpointError."""
        for part, mine in self._kept_of(slot).items():
            theirs = parts[part]
            if theirs.shape != mine.shape:
                name = self._name(self.shards[slot], WEIGHT if part == LAST_WEIGHT else part)
                shapes = tuple(theirs.shape), tuple(mine.shape)
                raise CheckpointError(Problem.TABLE_SHAPE, name, *shapes, self.shape.name)
            mine.copy_(theirs)

    def _name(self, shard: int, part: str) -> str:
        return f"{self.shape.name}/{shard:04d}/{part}"

    def _of_slot(self, slot: int) -> IdRows:
        first = slot * self.shape.rows_per_shard
        return self.rows[first : first + self.shape.rows_per_shard]

    def _kept(self) -> dict[str, Tensor]:
        """Views of the arrays in memory, by name in a checkpoint."""
        return {
            self._name(shard, part): values
            for slot, shard in enumerate(self.shards)
            for part, values in self._kept_of(slot).items()
        }

    def _kept_of(self, slot: int) -> dict[str, Tensor]:
        """Views of a shard's arrays in memory, by the last part of the name."""
        parts = self._of_slot(slot).parts
        return {LAST_WEIGHT if part == WEIGHT and self.optimizer.lags else part: parts[part] for part in parts}

    def _fill(self) -> None:
        for slot, shard in enumerate(self.shards):
            first = initial_rows(self.shape, shard, self._seed, self._scale)
            self._of_slot(slot).weight.copy_(torch.from_numpy(first))


class IdSource:
    """All tables of one width on this rank: the source of their vectors."""

    def __init__(self, rows: IdRows, optimizer: RowOptimizer) -> None:
        """`rows`: memory for the rows of all tables."""
        self.rows, self.width, self.optimizer = rows, rows.width, optimizer
        self.key_sources: dict[str, IdTable] = {}
        self.num_taken = 0
        """Rows that tables have taken."""
        self._taken: tuple[Tensor, IdRows, Tensor] | None = None
        """Rows of a training step, copies of them, and the weights read: a leaf, whose `.grad` is the step's."""

    def vectors(self, requests: Sequence[RowRequest]) -> list[Tensor]:
        """Return the vectors (Q, V) of each table's ids as they are now, with autograd attached."""
        served = list(zip(self.key_sources.values(), requests, strict=True))
        places = [table.settle(request) for table, request in served]
        rows_Q = torch.cat([place_U + table.first_row for place_U, (table, _) in zip(places, served, strict=True)])
        rows = self.rows.take(rows_Q)
        weight_QV = self.optimizer.current(rows).contiguous()
        if torch.is_grad_enabled():
            self._taken = (rows_Q, rows, weight_QV.requires_grad_())
        read = torch.split(weight_QV, [len(place_U) for place_U in places])
        return [table.of_ids(request, rows_UV) for (table, request), rows_UV in zip(served, read, strict=True)]

    def move(self, rates: Rates) -> None:
        """Step the optimiser on the rows last read in training, if there are gradients; and on no others."""
        taken, self._taken = self._taken, None
        if taken is None:
            return
        rows_Q, rows, weight_QV = taken
        if len(rows_Q) and weight_QV.grad is not None:
            self.optimizer.step(rows, weight_QV.detach(), weight_QV.grad, rates)
            self.rows.put(rows_Q, rows)
