"""ID tables: hashed rows, cut into shards, each shard on the rank that owns it, with a sparse row-wise Adam beside.

The rows of all tables of one width lie in one piece of memory, and a step of Adam moves all of them at once. A row's
place depends on the id and the table's shape alone, its initial value on (seed, table, shard, row, column)
alone: neither on the number of ranks.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featurestore.distinct import DistinctCount
from featurestore.keys import UInt64Array, key_of_uri, owned_shards, owner_of, shard_of, shard_of_hash, splitmix64
from trainer.errors import CheckpointError, ConfigError
from trainer.optim import AdamRates
from trainer.routing import Int64, unique

_PARTS = ("weight", "momentum", "variance", "steps")


@dataclass(frozen=True)
class TableShape:
    """What every rank knows of a table: `num_rows` is rounded up so that every shard has equally many."""

    name: str
    width: int
    num_rows: int
    num_shards: int

    @property
    def rows_per_shard(self) -> int:
        """Rows of each shard, at least one."""
        return -(-self.num_rows // self.num_shards)

    @property
    def size(self) -> int:
        """Rows of all shards."""
        return self.num_shards * self.rows_per_shard

    def place_of(self, ids_N: Int64) -> tuple[Int64, Int64]:
        """Shard and row in the shard of each id. Top bits of the hash choose the shard, low bits the row."""
        return self._place_of_hash(splitmix64(ids_N))

    def rows_of_hashes(self, hash_N: UInt64Array) -> Int64:
        """The row of each splitmix64 hash of an id, by its place in the whole table, shard by shard."""
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


@dataclass(frozen=True)
class Rows:
    """Rows of one width, (M, V), and their Adam state: `variance` and `steps` (M,)."""

    weight: Tensor
    momentum: Tensor
    variance: Tensor
    steps: Tensor

    @classmethod
    def zeros(cls, num_rows: int, width: int, device: torch.device | str, dtype: torch.dtype) -> "Rows":
        """So many rows of zeros, never touched."""
        weight, momentum = (torch.zeros(num_rows, width, dtype=dtype, device=device) for _ in range(2))
        steps = torch.zeros(num_rows, dtype=torch.int32, device=device)
        return cls(weight, momentum, torch.zeros(num_rows, dtype=dtype, device=device), steps)


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
        shared: Rows,
        first_row: int,
    ) -> None:
        """Use `build_tables`. `shared` has room for this table from `first_row` on."""
        self.shape, self.width = shape, shape.width
        self.shards = owned_shards(shape.num_shards, rank, num_ranks)
        self._num_ranks = num_ranks
        self._slot_of_shard = np.full(shape.num_shards, -1, dtype=np.int64)
        self._slot_of_shard[self.shards] = np.arange(len(self.shards))
        num_rows = owned_rows(shape, rank, num_ranks)
        self.shared, self._first_row = shared, first_row
        mine = slice(first_row, first_row + num_rows)
        self.weight, self.momentum = self.shared.weight[mine], self.shared.momentum[mine]
        self.variance, self.steps = self.shared.variance[mine], self.shared.steps[mine]
        for slot, shard in enumerate(self.shards):
            self._of_slot(self.weight, slot).copy_(torch.from_numpy(initial_rows(shape, shard, seed, scale)))
        self._touched: tuple[Tensor, Tensor] | None = None
        self.seen = DistinctCount()
        """Different ids that this rank has served in training."""

    def owner_of(self, ids_U: Int64) -> Int64:
        """The rank that has the row of each id."""
        return owner_of(shard_of(ids_U, self.shape.num_shards), self._num_ranks)

    def serve(self, ids_R: Int64, kind: str = "step") -> RowRequest:
        """The unique rows behind ids that this rank owns; two ids of one row get the same. Reads no weight.

        The ids of a training step, which comes in the order of steps, are noted in `seen`.
        """
        if kind == "step":
            self.seen = self.seen.with_values(ids_R)
        shard_R, row_R = self.shape.place_of(ids_R)
        slot_R = self._slot_of_shard[shard_R]
        assert (slot_R >= 0).all(), f"table {self.shape.name}: asked for rows that another rank owns"
        rows_Q, inverse_R = unique(slot_R * self.shape.rows_per_shard + row_R)
        return RowRequest(torch.from_numpy(rows_Q).to(self.weight.device), inverse_R, len(rows_Q))

    def vectors(self, request: RowRequest) -> Tensor:
        """The rows (Q, V) as an autograd leaf; `take_gradients` hands out what has gathered in its `.grad`."""
        rows_QV = self.weight.index_select(0, request.rows_Q)
        if torch.is_grad_enabled():
            rows_QV.requires_grad_()
            self._touched = (request.rows_Q, rows_QV)
        return rows_QV

    def release(self, request: RowRequest) -> None:
        """Nothing to give back."""

    def take_gradients(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The rows of the last `vectors` (Q,), by their place in `shared`, their values and gradients (Q, V); once."""
        touched, self._touched = self._touched, None
        if touched is None:
            return None
        rows_Q, leaf_QV = touched
        if leaf_QV.grad is None or len(rows_Q) == 0:
            return None
        return rows_Q + self._first_row, leaf_QV.detach(), leaf_QV.grad

    def names(self) -> list[str]:
        """Names of this rank's tensors in a checkpoint: <table>/<shard>/<part>."""
        return [self._name(shard, part) for shard in self.shards for part in _PARTS]

    def export_shards(self) -> dict[str, Tensor]:
        """Rows and Adam state of the owned shards under `names()`: views, to be written before the next step."""
        return {
            self._name(shard, part): self._of_slot(getattr(self, part), slot)
            for slot, shard in enumerate(self.shards)
            for part in _PARTS
        }

    def import_shards(self, state: Mapping[str, Tensor]) -> None:
        """Takes the owned shards out of `state`, which may hold others. Raises CheckpointError."""
        for name, mine in self.export_shards().items():
            if name not in state:
                raise CheckpointError(
                    f"{name} is not in the checkpoint; was it written with another model.table_shards?"
                )
            theirs = state[name]
            if theirs.shape != mine.shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(theirs.shape)} in the checkpoint and {tuple(mine.shape)} in this run; "
                    f"set model.tables.{self.shape.name}, the table's width and model.table_shards as they were"
                )
            mine.copy_(theirs)

    def _name(self, shard: int, part: str) -> str:
        return f"{self.shape.name}/{shard:04d}/{part}"

    def _of_slot(self, values: Tensor, slot: int) -> Tensor:
        return values.narrow(0, slot * self.shape.rows_per_shard, self.shape.rows_per_shard)


def owned_rows(shape: TableShape, rank: int, num_ranks: int) -> int:
    """Rows of a table that a rank holds."""
    return len(owned_shards(shape.num_shards, rank, num_ranks)) * shape.rows_per_shard


def owned_bytes(shape: TableShape, rank: int, num_ranks: int, dtype: torch.dtype) -> int:
    """Bytes of a rank's rows of a table and of their Adam state."""
    return owned_rows(shape, rank, num_ranks) * row_bytes(shape.width, dtype)


def row_bytes(width: int, dtype: torch.dtype) -> int:
    """Bytes of a row, its momentum, variance and steps."""
    return (2 * width + 1) * dtype.itemsize + torch.int32.itemsize


def build_tables(
    shapes: Iterable[TableShape],
    rank: int,
    num_ranks: int,
    *,
    seed: int,
    scale: float,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, IdTable]:
    """The tables by name; the rows of those of one width lie one after the other.

    Raises ConfigError where the system refuses the memory.
    """
    shapes = list(shapes)
    rows_of_width: dict[int, int] = {}
    first_rows = []
    for shape in shapes:
        first_rows.append(rows_of_width.get(shape.width, 0))
        rows_of_width[shape.width] = first_rows[-1] + owned_rows(shape, rank, num_ranks)
    shared = {width: _memory_of(shapes, count, width, device, dtype) for width, count in rows_of_width.items()}
    return {
        shape.name: IdTable(
            shape, rank, num_ranks, seed=seed, scale=scale, shared=shared[shape.width], first_row=first_row
        )
        for shape, first_row in zip(shapes, first_rows, strict=True)
    }


def _memory_of(
    shapes: Sequence[TableShape], count: int, width: int, device: torch.device | str, dtype: torch.dtype
) -> Rows:
    """Rows of all tables of one width. Raises ConfigError that names the largest one."""
    try:
        return Rows.zeros(count, width, device, dtype)
    except (RuntimeError, MemoryError) as failure:  # torch has no class of its own for the memory of a CPU
        shape = max((shape for shape in shapes if shape.width == width), key=lambda shape: shape.num_rows)
        raise ConfigError(
            f"model.tables.{shape.name}={shape.num_rows}: this rank's {count:,} rows of {width} numbers and their Adam "
            f"state take {count * row_bytes(width, dtype) / 1e9:,.1f} GB, which the system refuses; lower it, or use "
            "more ranks"
        ) from failure


def apply_gradients(tables: Iterable[IdTable], rates: AdamRates) -> None:
    """One row-wise Adam step on the rows of every table's last `vectors`, and on no others."""
    of_memory: dict[int, tuple[Rows, list[tuple[Tensor, Tensor, Tensor]]]] = {}
    for table in tables:
        if (taken := table.take_gradients()) is not None:
            of_memory.setdefault(id(table.shared), (table.shared, []))[1].append(taken)
    for rows, parts in of_memory.values():
        rows_Q, weight_QV, gradient_QV = (torch.cat(each) for each in zip(*parts, strict=True))
        _adam_step(rows, rows_Q, weight_QV, gradient_QV, rates)


@torch.no_grad()
def _adam_step(rows: Rows, rows_Q: Tensor, weight_QV: Tensor, gradient_QV: Tensor, rates: AdamRates) -> None:
    """m is kept per element; v is one number a row, the running mean of the squared gradient over the row
    (FBGEMM's PARTIAL_ROWWISE_ADAM); bias is corrected by the number of steps that touched the row.

    With `rates.id_l2`, the adaptive L2 of DIN (Zhou et al., arXiv 1706.06978, section 5.1): id_l2 / n x the row is
    added to its gradient, in steps that touch the row alone. n is the number of steps that touched it so far, this
    one included. DIN takes the row's samples in the whole data for n, which nobody knows while the data still come;
    counted in steps, the shares 1 / n of a pass over known data add up to one L2 a row, as theirs do before they
    are approximated, and a row's owner has the number at hand, the same for any number of ranks.
    """
    steps_Q = rows.steps.index_select(0, rows_Q) + 1
    if rates.id_l2:
        gradient_QV = gradient_QV + weight_QV * (rates.id_l2 / steps_Q.to(weight_QV.dtype)).unsqueeze(1)
    momentum_QV = rows.momentum.index_select(0, rows_Q).lerp_(gradient_QV, 1 - rates.beta1)
    variance_Q = rows.variance.index_select(0, rows_Q).lerp_(gradient_QV.square().mean(1), 1 - rates.beta2)
    rows.steps.index_copy_(0, rows_Q, steps_Q)
    rows.momentum.index_copy_(0, rows_Q, momentum_QV)
    rows.variance.index_copy_(0, rows_Q, variance_Q)
    count_Q = steps_Q.to(variance_Q.dtype)
    deviation_Q = (variance_Q / (1 - rates.beta2**count_Q)).sqrt_().add_(rates.eps)
    step_Q = rates.lr / (1 - rates.beta1**count_Q) / deviation_Q
    rows.weight.index_copy_(0, rows_Q, weight_QV - momentum_QV * step_Q.unsqueeze(1))


def initial_rows(shape: TableShape, shard: int, seed: int, scale: float) -> NDArray[np.float64]:
    """The first values of one shard, (rows_per_shard, width): uniform with mean 0 and standard deviation `scale`.

    Counter based: splitmix64 of a stream start, drawn from (seed, table, shard), plus row x width + column.
    """
    start = np.uint64(key_of_uri(f"{seed}/{shape.name}/{shard}") & 0xFFFFFFFFFFFFFFFF)
    counter = np.arange(shape.rows_per_shard * shape.width, dtype=np.uint64) + start
    unit = (splitmix64(counter.view(np.int64)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    unit -= 0.5
    unit *= scale * 12**0.5
    return unit.reshape(shape.rows_per_shard, shape.width)
