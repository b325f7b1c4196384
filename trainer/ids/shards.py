"""The rows of ID tables: how they lie in memory and are divided into shards, and their first values.

A row's place depends on the id and the table's shape alone, its initial value on (seed, table, shard, row,
column): neither on the number of ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from featurestore import keys
from trainer.errors import CheckpointError
from trainer.problems import Problem

WEIGHT = "weight"


@dataclass(frozen=True)
class StatePart:
    """A part of the optimiser's state of a row: a number for each of its weights, one number, or one count (int32)."""

    name: str
    kind: Literal["vector", "number", "count"]

    def numbers(self, width: int) -> int:
        """Count the numbers that it takes of a row whose vector has `width`; a count has the room of a number."""
        return width if self.kind == "vector" else 1

    def view(self, numbers_NK: Tensor) -> Tensor:
        """View the numbers (N, K) of this part in their own type: (N, V), or (N,)."""
        if self.kind == "vector":
            return numbers_NK
        return (numbers_NK.view(torch.int32) if self.kind == "count" else numbers_NK)[:, 0]


_WEIGHT = StatePart(WEIGHT, "vector")


class IdRows:
    """N rows, all numbers of one row side by side: it is found in memory once, and not once for each of its parts."""

    def __init__(self, block_NW: Tensor, width: int, state: Sequence[StatePart]) -> None:
        """`block_NW`: of each row its weights, then what `state` says."""
        self.block_NW, self.width, self.state = block_NW, width, state
        every = (_WEIGHT, *state)
        pieces = torch.split(block_NW, [part.numbers(width) for part in every], dim=1)
        self.parts: Mapping[str, Tensor] = {
            part.name: part.view(piece) for part, piece in zip(every, pieces, strict=True)
        }
        """Views by name: `weight` (N, V), and the parts of an optimiser's state, each (N, V) or (N,)."""

    @classmethod
    def zeros(
        cls, num_rows: int, width: int, state: Sequence[StatePart], device: torch.device | str, dtype: torch.dtype
    ) -> "IdRows":
        """Make `num_rows` rows of zeros, never touched.

        On a CPU the system hands out memory when it is first written to: rows that nothing has touched take none."""
        shape = num_rows, numbers_of(width, state)
        if num_rows and torch.device(device).type == "cpu":  # torch.zeros writes
            block_NW = torch.from_numpy(np.zeros(shape, torch.empty(0, dtype=dtype).numpy().dtype))
        else:
            block_NW = torch.zeros(shape, dtype=dtype, device=device)
        return cls(block_NW, width, state)

    @property
    def weight(self) -> Tensor:
        """(N, V); see `RowOptimizer.current` for what it is worth."""
        return self.parts[WEIGHT]

    def __getitem__(self, rows: slice) -> "IdRows":
        """View some of the rows."""
        return IdRows(self.block_NW[rows], self.width, self.state)

    def take(self, rows_Q: Tensor) -> "IdRows":
        """Copy chosen rows."""
        return IdRows(self.block_NW.index_select(0, rows_Q), self.width, self.state)

    def put(self, rows_Q: Tensor, rows: "IdRows") -> None:
        """Write rows to places `rows_Q`, all different."""
        self.block_NW.index_put_((rows_Q,), rows.block_NW)


def numbers_of(width: int, state: Sequence[StatePart]) -> int:
    """Count the numbers of a row: its weights, and its optimiser's state."""
    return sum(part.numbers(width) for part in (_WEIGHT, *state))


def row_bytes(width: int, state: Sequence[StatePart], dtype: torch.dtype) -> int:
    """Compute the bytes of a row and of its optimiser's state."""
    return numbers_of(width, state) * dtype.itemsize


@dataclass(frozen=True)
class TableShape:
    """Shape of a table, known on every rank: `num_rows` is rounded up so that every shard has equally many."""

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
        """The setting of the table as a user writes it, for messages."""
        return f"model.tables.{self.name}={self.num_rows}"

    @property
    def index_bytes(self) -> int:
        """Bytes that a shard takes beside its rows."""
        return 0

    @property
    def size(self) -> int:
        """Rows of all shards."""
        return self.num_shards * self.rows_per_shard

    def place_of(self, ids_N: keys.Int64Array) -> tuple[keys.Int64Array, keys.Int64Array]:
        """Find shard and row in the shard of each id."""
        if self.direct:
            return ids_N % self.num_shards, ids_N // self.num_shards
        return hashed_place(keys.splitmix64(ids_N), self.num_shards, self.rows_per_shard)

    def shards_of(self, ids_N: keys.Int64Array) -> keys.Int64Array:
        """Find the shard of each id."""
        return ids_N % self.num_shards if self.direct else keys.shard_of(ids_N, self.num_shards)


def hashed_place(
    hash_N: keys.UInt64Array, num_shards: int, rows_per_shard: int | keys.Int64Array
) -> tuple[keys.Int64Array, keys.Int64Array]:
    """Find shard and row in the shard of hashed ids: top bits choose the shard, low bits the row.

    `rows_per_shard`: of their table, or of the table of each, (N,)."""
    low_bits_N = hash_N.astype(np.uint32)  # divided in a third of the time of 64 bits
    row_N = low_bits_N % np.asarray(rows_per_shard, np.uint32)
    return keys.shard_of_hash(hash_N, num_shards), row_N.astype(np.int64)


def owned_rows(shape: TableShape, rank: int, num_ranks: int) -> int:
    """Count the rows of a table that a rank holds."""
    return len(keys.owned_shards(shape.num_shards, rank, num_ranks)) * shape.rows_per_shard


def owned_bytes(shape: TableShape, rank: int, num_ranks: int, state: Sequence[StatePart], dtype: torch.dtype) -> int:
    """Compute the bytes of a rank's rows of a table, of their optimiser's state and of their index."""
    index_bytes = len(keys.owned_shards(shape.num_shards, rank, num_ranks)) * shape.index_bytes
    return owned_rows(shape, rank, num_ranks) * row_bytes(shape.width, state, dtype) + index_bytes


def initial_rows(shape: TableShape, shard: int, seed: int, scale: float) -> keys.Float64Array:
    """Draw the first values of one shard, (rows_per_shard, width): uniform with mean 0 and standard deviation `scale`.

    Counter based: splitmix64 of a stream start, drawn from (seed, table, shard), plus row x width + column.
    """
    counter = np.arange(shape.rows_per_shard * shape.width, dtype=np.uint64)
    counter += keys.stream_start(f"{seed}/{shape.name}/{shard}")
    return uniform(counter, scale).reshape(shape.rows_per_shard, shape.width)


def uniform(counter_N: keys.UInt64Array, scale: float) -> keys.Float64Array:
    """Draw numbers of mean 0 and standard deviation `scale`, (N,), each by its counter alone."""
    unit_N = keys.unit_interval(keys.splitmix64(counter_N.view(np.int64)))
    unit_N -= 0.5
    unit_N *= scale * 12**0.5
    return unit_N


def check_names(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless both have the same names with the same shapes."""
    missing, unknown = sorted(set(mine) - set(theirs)), sorted(set(theirs) - set(mine))
    if missing or unknown:
        raise CheckpointError(Problem.OTHER_TENSORS, len(missing), missing[:5], len(unknown), unknown[:5])
    for name, value in mine.items():
        if value.shape != theirs[name].shape:
            raise CheckpointError(Problem.TENSOR_SHAPE, name, tuple(theirs[name].shape), tuple(value.shape))
