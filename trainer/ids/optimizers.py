"""Optimisers of ID rows, and the rows they update; decay of rows not seen is exact.

Q rows touched, V numbers in each; all work on copies of these rows alone. The row's `gradient_QV` is the sum over all
ranks, of the mean loss over the global batch.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trainer.config.options import OptimConfig
from trainer.errors import CheckpointError
from trainer.ids.drift import Drift
from trainer.optim import Rates

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


LAST_WEIGHT = "last_weight"
"""Name in a checkpoint of the weights as the last step that touched the row left them, where `weight` is newer."""
SHARED_STATE = "ids/"
"""How names of what a checkpoint has of the optimiser beside the rows begin."""
_RATES = f"{SHARED_STATE}learning_rates"


class RowOptimizer:
    """Leaves rows as they are: what evaluation needs. One object serves all tables of a rank."""

    state: tuple[StatePart, ...] = ()
    """What is kept of a row together with its weights."""
    lags = False
    """Whether weights in memory may be others than `result`."""

    def __init__(self, config: OptimConfig) -> None:
        self._config = config

    def current(self, rows: IdRows) -> Tensor:
        """Return the weights (Q, V) of these rows as they are now; a view where no step moves rows beside its own."""
        return rows.weight

    def result(self, rows: IdRows) -> Tensor:
        """Return what these rows are worth outside of training (Q, V)."""
        return self.current(rows)

    def read(self, rows: IdRows) -> Tensor:
        """Return what a batch is to see of these rows (Q, V)."""
        return self.current(rows)

    def averaged(self) -> AbstractContextManager[None]:
        """Let `read` return averages in the block, where there are such."""
        return nullcontext()

    @torch.no_grad()
    def step(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> None:
        """Move copies of the rows that the step touches, whose weights now are `weight_QV`, and their state."""
        rows.weight.copy_(self._move(rows, weight_QV, gradient_QV, rates))

    def end_step(self, rates: Rates) -> None:
        """End the step, with or without rows; every rank calls it."""

    def restart(self) -> None:
        """Begin all rows anew, with zero as their state."""

    def shared_state(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs beside the rows: the same on every rank."""
        return {}

    def load_shared_state(self, state: Mapping[str, Tensor]) -> None:
        """Take `shared_state` out of `state`. Raises CheckpointError where it is not there."""

    def _move(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> Tensor:
        """Change the state of these rows in place; return the new weights."""
        raise AssertionError("these rows are read and not trained")


class Adam(RowOptimizer):
    """Adam with moments of each weight, which shrink in every step: as torch.optim.Adam on the whole table.

    A row is moved by the steps that touch it; when it is read, it makes up for the others. Its
    weight in memory is that after step `last_step`, its last; what a lookup, a checkpoint or an export gets is newer.
    """

    state = (StatePart("momentum", "vector"), StatePart("variance", "vector"), StatePart("last_step", "count"))
    lags = True

    def __init__(self, config: OptimConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        """Raises ConfigError for betas that do not fit the type."""
        super().__init__(config)
        self._drift = Drift(config.beta1, config.beta2, config.eps, dtype, device)

    def current(self, rows: IdRows) -> Tensor:
        parts = rows.parts
        return self._drift.moved(rows.weight, parts["momentum"], parts["variance"], parts["last_step"])

    def _move(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> Tensor:
        config, number, parts = self._config, self._drift.num_steps + 1, rows.parts
        steps_Q = (number - parts["last_step"]).double()
        momentum_QV = parts["momentum"].mul_(_power(config.beta1, steps_Q, weight_QV.dtype))
        momentum_QV.add_(gradient_QV, alpha=1 - config.beta1)
        variance_QV = parts["variance"].mul_(_power(config.beta2, steps_Q, weight_QV.dtype))
        variance_QV.addcmul_(gradient_QV, gradient_QV, value=1 - config.beta2)
        parts["last_step"].fill_(number)
        deviation_QV = variance_QV.sqrt().mul_(1 / math.sqrt(1 - config.beta2**number)).add_(config.eps)
        return torch.addcdiv(weight_QV, momentum_QV, deviation_QV, value=-rates.ids_lr / (1 - config.beta1**number))

    def end_step(self, rates: Rates) -> None:
        self._drift.add_step(rates.ids_lr)

    def restart(self) -> None:
        self._drift.restart()

    def shared_state(self) -> dict[str, Tensor]:
        return {_RATES: torch.tensor(self._drift.rates, dtype=torch.float64)}

    def load_shared_state(self, state: Mapping[str, Tensor]) -> None:
        if _RATES not in state:
            raise CheckpointError("the checkpoint has no learning rates of ID rows; set optim.ids as it was")
        self._drift.resume(state[_RATES].tolist())


def _power(beta: float, steps_Q: Tensor, dtype: torch.dtype) -> Tensor:
    """beta^steps (Q, 1), by float64's exp, which is quick; a base rounded to float32 would tell after some steps."""
    return torch.exp(steps_Q * (math.log(beta) if beta else -math.inf)).to(dtype).unsqueeze(1)
