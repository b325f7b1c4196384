"""Rows of ID tables of one width in memory: their weights, and what an optimiser keeps beside each of them."""

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

    def bytes_of(self, width: int, dtype: torch.dtype) -> int:
        """Compute the bytes of one row whose vector has `width` numbers."""
        if self.kind == "count":
            return torch.int32.itemsize
        return dtype.itemsize * (width if self.kind == "vector" else 1)

    def zeros(self, num_rows: int, width: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """Make zeros for so many rows: (num_rows, width), or (num_rows,).

        On a CPU the system hands out memory when it is first written to: rows that nothing has touched take none."""
        shape = (num_rows, width) if self.kind == "vector" else (num_rows,)
        dtype = torch.int32 if self.kind == "count" else dtype
        if torch.device(device).type == "cpu":  # torch.zeros writes
            return torch.from_numpy(np.zeros(shape, torch.empty(0, dtype=dtype).numpy().dtype))
        return torch.zeros(shape, dtype=dtype, device=device)


@dataclass(frozen=True)
class IdRows:
    """Rows by part: `weight` (N, V), and the parts of an optimiser's state, each (N, V) or (N,)."""

    parts: Mapping[str, Tensor]

    @classmethod
    def zeros(
        cls, num_rows: int, width: int, state: Sequence[StatePart], device: torch.device | str, dtype: torch.dtype
    ) -> "IdRows":
        """Make so many rows of zeros, never touched."""
        every = (StatePart(WEIGHT, "vector"), *state)
        return cls({part.name: part.zeros(num_rows, width, device, dtype) for part in every})

    @property
    def weight(self) -> Tensor:
        """(N, V); see `RowOptimizer.current` for what it is worth."""
        return self.parts[WEIGHT]

    def narrow(self, first: int, count: int) -> "IdRows":
        """View neighbouring rows."""
        return IdRows({name: part.narrow(0, first, count) for name, part in self.parts.items()})

    def take(self, rows_Q: Tensor, names: Sequence[str] | None = None) -> "IdRows":
        """Copy chosen rows; only the parts of these names, if there are any."""
        return IdRows({name: self.parts[name].index_select(0, rows_Q) for name in names or self.parts})

    def put(self, rows_Q: Tensor, rows: "IdRows") -> None:
        """Write the parts that `rows` has to places `rows_Q`, all different."""
        for name, values in rows.parts.items():
            self.parts[name].index_put_((rows_Q,), values)


def row_bytes(width: int, state: Sequence[StatePart], dtype: torch.dtype) -> int:
    """Compute the bytes of a row and of its optimiser's state."""
    return sum(part.bytes_of(width, dtype) for part in (StatePart(WEIGHT, "vector"), *state))
