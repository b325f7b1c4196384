"""Rows of ID tables of one width in memory: their weights, and what an optimiser keeps of each of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

WEIGHT = "weight"


@dataclass(frozen=True)
class StatePart:
    """What an optimiser keeps of a row: a number for each of its weights, one number, or one count (int32)."""

    name: str
    kind: Literal["vector", "number", "count"]

    def numbers(self, width: int) -> int:
        """Count the numbers that it takes of a row whose vector has `width`; a count has the room of a number."""
        return width if self.kind == "vector" else 1

    def view(self, numbers_NK: Tensor) -> Tensor:
        """View the numbers (N, K) of this part as what they are: (N, V), or (N,)."""
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

    def narrow(self, first: int, count: int) -> "IdRows":
        """View neighbouring rows."""
        return IdRows(self.block_NW.narrow(0, first, count), self.width, self.state)

    def take(self, rows_Q: Tensor) -> "IdRows":
        """Copy chosen rows."""
        return IdRows(self.block_NW.index_select(0, rows_Q), self.width, self.state)

    def put(self, rows_Q: Tensor, rows: "IdRows") -> None:
        """Write rows to places `rows_Q`, all different."""
        self.block_NW.index_put_((rows_Q,), rows.block_NW)


def numbers_of(width: int, state: Sequence[StatePart]) -> int:
    """Count the numbers of a row: its weights, and what an optimiser keeps of it."""
    return sum(part.numbers(width) for part in (_WEIGHT, *state))


def row_bytes(width: int, state: Sequence[StatePart], dtype: torch.dtype) -> int:
    """Compute the bytes of a row and of its optimiser's state."""
    return numbers_of(width, state) * dtype.itemsize
