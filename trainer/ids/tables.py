"""ID tables: vectors of IDs, sharded over the ranks, as sources of the exchange.

The rows of all tables of one width lie in one piece of memory, and a step of the optimiser moves all of them at once. A
row's place depends on the id and the table's shape alone, its initial value on (seed, table, shard, row, column) and,
where rows begin anew with each epoch, on the epoch: neither on the number of ranks.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featurestore.keys import (
    UInt64Array,
    owned_shards,
    owner_of,
    shard_of,
    shard_of_hash,
    splitmix64,
    stream_start,
    unit_interval,
)
from featurestore.lookup.embedding import on_device
from trainer.errors import CheckpointError, ConfigError
from trainer.exchange.routing import Int64, unique_below
from trainer.ids.optimizers import LAST_WEIGHT, WEIGHT, IdRows, RowOptimizer, StatePart, row_bytes
from trainer.optim import Rates, check_names
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


@dataclass(frozen=True)
class TableShape:
    """What every rank knows of a table: `num_rows` is rounded up so that every shard has equally many."""

    name: str
    width: int
    num_rows: int
    num_shards: int
    direct: bool = False
    """Whether ids are 0 to num_rows - 1, each with a row of its own, as buckets of numbers are; others are hashed."""

    @property
    def rows_per_shard(self) -> int:
        """Rows of each shard, at least one."""
        return -(-self.num_rows // self.num_shards)

    @property
    def setting(self) -> str:
        """What a person has set, for messages."""
        return f"model.tables.{self.name}={self.num_rows}"

    @property
    def index_bytes(self) -> int:
        """Bytes that a shard takes beside its rows."""
        return 0

    @property
    def size(self) -> int:
        """Rows of all shards."""
        return self.num_shards * self.rows_per_shard

    def table(self, rank: int, num_ranks: int, **others: Any) -> "IdTable":
        """Make the table of this shape; see `build_tables`."""
        return IdTable(self, rank, num_ranks, **others)

    def place_of(self, ids_N: Int64) -> tuple[Int64, Int64]:
        """Find shard and row in the shard of each id. Top bits of the hash choose the shard, low bits the row."""
        if self.direct:
            return ids_N % self.num_shards, ids_N // self.num_shards
        return self._place_of_hash(splitmix64(ids_N))

    def shards_of(self, ids_N: Int64) -> Int64:
        """Find the shard of each id."""
        return ids_N % self.num_shards if self.direct else shard_of(ids_N, self.num_shards)

    def rows_of_hashes(self, hash_N: UInt64Array) -> Int64:
        """Find the row of each splitmix64 hash of an id, by its place in the whole table, shard by shard."""
        shard_N, row_N = self._place_of_hash(hash_N)
        return shard_N * self.rows_per_shard + row_N

    def _place_of_hash(self, hash_N: UInt64Array) -> tuple[Int64, Int64]:
        low_bits_N = hash_N & np.uint64(0xFFFFFFFF)
        return shard_of_hash(hash_N, self.num_shards), (low_bits_N % np.uint64(self.rows_per_shard)).astype(np.int64)


@dataclass
class RowRequest:
    """Unique local rows (Q,), ascending, and for each of R ids asked its place among them."""

    rows_Q: Tensor
    inverse_R: Int64
    num_unique: int


class IdTable:
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
        self.shape, self.width = shape, shape.width
        self._seed, self._scale, self.optimizer = seed, scale, optimizer
        self.shards = owned_shards(shape.num_shards, rank, num_ranks)
        self._num_ranks = num_ranks
        self._slot_of_shard = np.full(shape.num_shards, -1, dtype=np.int64)
        self._slot_of_shard[self.shards] = np.arange(len(self.shards))
        self.shared, self._first_row = shared, first_row
        self.rows = shared.rows.narrow(first_row, owned_rows(shape, rank, num_ranks))
        """This table's rows in `shared`."""
        self._leaf_QV: Tensor | None = None
        """What `vectors` has last returned in training."""
        self._fill(0)
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
        """Return what is counted on this rank beside `seen`, to be summed over ranks."""
        return {}

    def take_gradients(self) -> tuple[Tensor, Tensor] | None:
        """Give once what the last `vectors` returned in training and its gradients (Q, V), if there are any."""
        leaf_QV, self._leaf_QV = self._leaf_QV, None
        if leaf_QV is None or leaf_QV.grad is None or len(leaf_QV) == 0:
            return None
        return leaf_QV.detach(), leaf_QV.grad

    def restart(self, epoch: int) -> None:
        """Begin all rows anew for this epoch, with other values than before, and with zero as their state."""
        for part in self.rows.parts.values():
            part.zero_()
        self._fill(epoch)

    def names(self) -> list[str]:
        """List names of the tensors that `import_shards` takes of a checkpoint: <table>/<shard>/<part>."""
        return list(self._kept())

    def export_shards(self) -> dict[str, Tensor]:
        """Return weights as they are now, or their averages, and state of the owned shards, <table>/<shard>/<part>.

        They are to be written before the next step: views, but for averages and for weights that make up for steps that
        did not touch them; then what is in memory is there too, as part last_weight.
        """
        exported = self._kept()
        if self.optimizer.lags:
            for slot, shard in enumerate(self.shards):
                exported[self._name(shard, WEIGHT)] = self.optimizer.result(self._of_slot(slot))
        return exported

    def weights(self) -> dict[str, Tensor]:
        """View the owned shards' weights, <table>/<shard>/weight, for new values before the first step."""
        return {self._name(shard, WEIGHT): self._of_slot(slot).weight for slot, shard in enumerate(self.shards)}

    def warm_names(self) -> list[str]:
        """List names of the tensors that `begin_with` takes."""
        return list(self.weights())

    def begin_with(self, state: Mapping[str, Tensor]) -> None:
        """Take the owned shards' weights out of a checkpoint, before the first step; the optimiser's state stays.

        Raises CheckpointError."""
        mine = self.weights()
        check_names(mine, {name: state[name] for name in mine if name in state})
        for name, values in mine.items():
            values.copy_(state[name])

    def import_shards(self, state: Mapping[str, Tensor]) -> None:
        """Take the owned shards out of `state`, which may hold others. Raises CheckpointError."""
        for name, mine in self._kept().items():
            if name not in state:
                of_rows = "optim.ids, or without optim.id_l2 or optim.average_share"
                settings = "model.table_shards" if name.endswith(f"/{WEIGHT}") else of_rows
                raise CheckpointError(f"{name} is not in the checkpoint; was it written with another {settings}?")
            theirs = state[name]
            if theirs.shape != mine.shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(theirs.shape)} in the checkpoint and {tuple(mine.shape)} in this run; "
                    f"set model.tables.{self.shape.name}, the table's width and model.table_shards as they were"
                )
            mine.copy_(theirs)

    def _name(self, shard: int, part: str) -> str:
        return f"{self.shape.name}/{shard:04d}/{part}"

    def _of_slot(self, slot: int) -> IdRows:
        return self.rows.narrow(slot * self.shape.rows_per_shard, self.shape.rows_per_shard)

    def _kept(self) -> dict[str, Tensor]:
        """Views of what is in memory, by name in a checkpoint."""
        return {
            self._name(shard, part): values
            for slot, shard in enumerate(self.shards)
            for part, values in self._kept_of(slot).items()
        }

    def _kept_of(self, slot: int) -> dict[str, Tensor]:
        """Views of what is in memory of a shard, by the last part of the name."""
        parts = self._of_slot(slot).parts
        return {LAST_WEIGHT if part == WEIGHT and self.optimizer.lags else part: parts[part] for part in parts}

    def _fill(self, epoch: int) -> None:
        for slot, shard in enumerate(self.shards):
            first = initial_rows(self.shape, shard, self._seed, self._scale, epoch)
            self._of_slot(slot).weight.copy_(torch.from_numpy(first))


def owned_rows(shape: TableShape, rank: int, num_ranks: int) -> int:
    """Count the rows of a table that a rank holds."""
    return len(owned_shards(shape.num_shards, rank, num_ranks)) * shape.rows_per_shard


def owned_bytes(shape: TableShape, rank: int, num_ranks: int, state: Sequence[StatePart], dtype: torch.dtype) -> int:
    """Compute the bytes of a rank's rows of a table, of their optimiser's state and of what finds them."""
    index_bytes = len(owned_shards(shape.num_shards, rank, num_ranks)) * shape.index_bytes
    return owned_rows(shape, rank, num_ranks) * row_bytes(shape.width, state, dtype) + index_bytes


def build_tables(
    shapes: Iterable[TableShape],
    rank: int,
    num_ranks: int,
    *,
    seed: int,
    scale: float,
    optimizer: RowOptimizer,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, IdTable]:
    """Make the tables by name; the rows of those of one width lie one after the other. `scale`: see `initial_rows`.

    Raises ConfigError where the system refuses the memory.
    """
    shapes = list(shapes)
    rows_of_width: dict[int, int] = {}
    first_rows = []
    for shape in shapes:
        first_rows.append(rows_of_width.get(shape.width, 0))
        rows_of_width[shape.width] = first_rows[-1] + owned_rows(shape, rank, num_ranks)
    shared = {
        width: SharedRows(_memory_of(shapes, count, width, optimizer.state, device, dtype), optimizer)
        for width, count in rows_of_width.items()
    }
    return {
        shape.name: shape.table(
            rank,
            num_ranks,
            seed=seed,
            scale=scale,
            optimizer=optimizer,
            shared=shared[shape.width],
            first_row=first_row,
        )
        for shape, first_row in zip(shapes, first_rows, strict=True)
    }


def _memory_of(
    shapes: Sequence[TableShape],
    count: int,
    width: int,
    state: Sequence[StatePart],
    device: torch.device | str,
    dtype: torch.dtype,
) -> IdRows:
    """Rows of all tables of one width. Raises ConfigError that names the largest one."""
    try:
        return IdRows.zeros(count, width, state, device, dtype)
    except (RuntimeError, MemoryError) as failure:  # torch has no class of its own for the memory of a CPU
        shape = max((shape for shape in shapes if shape.width == width), key=lambda shape: shape.num_rows)
        raise ConfigError(
            f"{shape.setting}: this rank's {count:,} rows of {width} numbers and their "
            f"optimiser's state take {count * row_bytes(width, state, dtype) / 1e9:,.1f} GB, which the system refuses; "
            "lower it, or use more ranks"
        ) from failure


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


def initial_rows(shape: TableShape, shard: int, seed: int, scale: float, epoch: int = 0) -> NDArray[np.float64]:
    """Draw the first values of one shard, (rows_per_shard, width): uniform with mean 0 and standard deviation `scale`.

    Counter based: splitmix64 of a stream start, drawn from (seed, table, shard) and, after the first one, the epoch,
    plus row x width + column.
    """
    stream = f"{seed}/{shape.name}/{shard}" + (f"/{epoch}" if epoch else "")
    counter = np.arange(shape.rows_per_shard * shape.width, dtype=np.uint64) + stream_start(stream)
    return uniform(counter, scale).reshape(shape.rows_per_shard, shape.width)


def uniform(counter_N: UInt64Array, scale: float) -> NDArray[np.float64]:
    """Draw numbers of mean 0 and standard deviation `scale`, (N,), each by its counter alone."""
    unit_N = unit_interval(splitmix64(counter_N.view(np.int64)))
    unit_N -= 0.5
    unit_N *= scale * 12**0.5
    return unit_N
