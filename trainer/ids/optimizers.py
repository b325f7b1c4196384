"""The optimisers of ID rows: Adam, whose decay of rows not seen is exact, and row-wise Adagrad.

Q rows touched, V numbers in each; all work on copies of these rows alone. The row's `gradient_QV` is the sum over all
ranks, of the mean loss over the global batch.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.config import IdOptimizer, OptimConfig
from trainer.errors import CheckpointError
from trainer.ids.drift import Drift
from trainer.ids.shards import IdRows, StatePart
from trainer.optim import BETA1, BETA2, Rates
from trainer.problems import Problem

SHARED_STATE = "ids/"
"""Prefix of the names of optimiser state in a checkpoint that is not part of the rows."""
_RATES = f"{SHARED_STATE}learning_rates"


class RowOptimizer:
    """Leaves rows as they are, for evaluation. One object serves all tables of a rank."""

    state: tuple[StatePart, ...] = ()
    """State that a row keeps together with its weights."""
    mark = ""
    """The part of the state that is zero in rows that no step has touched, and in no others."""
    lags = False
    """Whether weights in memory may differ from those in a checkpoint."""

    def __init__(self, config: OptimConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        """`dtype`, `device`: of the rows."""
        self._config = config

    def current(self, rows: IdRows) -> Tensor:
        """Return the weights (Q, V) of these rows as they are now; a view where no step moves rows beside its own."""
        return rows.weight

    @torch.no_grad()
    def step(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> None:
        """Move copies of the rows that the step touches, whose weights now are `weight_QV`, and their state."""
        rows.weight.copy_(self._move(rows, weight_QV, gradient_QV, rates))

    def end_step(self, rates: Rates) -> None:
        """End the step, with or without rows; every rank calls it."""

    def shared_state(self) -> dict[str, Tensor]:
        """Return the optimiser's state in a checkpoint other than the rows: the same on every rank."""
        return {}

    def load_shared_state(self, state: Mapping[str, Tensor]) -> None:
        """Take `shared_state` out of `state`. Raises CheckpointError where it is not there."""

    def _move(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> Tensor:
        """Change the state of these rows in place; return the new weights."""
        raise AssertionError("these rows are read and not trained")


class Adam(RowOptimizer):
    """Adam with moments of each weight, which shrink in every step: as torch.optim.Adam on the whole table.

    A row is moved by the steps that touch it; when it is read, it makes up for the others. Its
    weight in memory is that after step `last_step`, its last; a lookup, a checkpoint or an export gets newer ones.
    """

    state = (StatePart("momentum", "vector"), StatePart("variance", "vector"), StatePart("last_step", "count"))
    mark, lags = "last_step", True

    def __init__(self, config: OptimConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(config, dtype, device)
        self._drift = Drift(config.eps, dtype, device)

    def current(self, rows: IdRows) -> Tensor:
        parts = rows.parts
        return self._drift.moved(rows.weight, parts["momentum"], parts["variance"], parts["last_step"])

    def _move(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> Tensor:
        eps, number, parts = self._config.eps, self._drift.num_steps + 1, rows.parts
        steps_Q = (number - parts["last_step"]).double()
        momentum_QV = parts["momentum"].mul_(_power(BETA1, steps_Q, weight_QV.dtype))
        momentum_QV.add_(gradient_QV, alpha=1 - BETA1)
        variance_QV = parts["variance"].mul_(_power(BETA2, steps_Q, weight_QV.dtype))
        variance_QV.addcmul_(gradient_QV, gradient_QV, value=1 - BETA2)
        parts["last_step"].fill_(number)
        deviation_QV = variance_QV.contiguous().sqrt().mul_(1 / math.sqrt(1 - BETA2**number)).add_(eps)
        return torch.addcdiv(weight_QV, momentum_QV, deviation_QV, value=-rates.ids_lr / (1 - BETA1**number))

    def end_step(self, rates: Rates) -> None:
        self._drift.add_step(rates.ids_lr)

    def shared_state(self) -> dict[str, Tensor]:
        return {_RATES: torch.tensor(self._drift.rates, dtype=torch.float64)}

    def load_shared_state(self, state: Mapping[str, Tensor]) -> None:
        if _RATES not in state:
            raise CheckpointError(Problem.NO_ROW_RATES)
        self._drift.resume(state[_RATES].tolist())


def _power(beta: float, steps_Q: Tensor, dtype: torch.dtype) -> Tensor:
    """beta^steps (Q, 1), by float64's exp, which is quick; a base rounded to float32 would tell after some steps."""
    return torch.exp(steps_Q * math.log(beta)).to(dtype).unsqueeze(1)


class RowwiseAdagrad(RowOptimizer):
    """Adagrad with one sum a row, of the mean squared gradient over it (FBGEMM's EXACT_ROWWISE_ADAGRAD)."""

    state, mark = (StatePart("sum", "number"),), "sum"

    def _move(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> Tensor:
        sum_Q = rows.parts["sum"].add_(gradient_QV.square().mean(1))
        step_Q = rates.ids_lr / sum_Q.sqrt().add_(self._config.eps)
        return weight_QV - gradient_QV * step_Q.unsqueeze(1)


_OPTIMIZERS: Mapping[IdOptimizer, type[RowOptimizer]] = {"adam": Adam, "rowwise_adagrad": RowwiseAdagrad}


def row_optimizer(config: OptimConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> RowOptimizer:
    """Make the optimiser of ID rows that `optim` names."""
    return _OPTIMIZERS[config.ids](config, dtype, device)


def state_of(config: OptimConfig) -> tuple[StatePart, ...]:
    """List the parts of a row's state in the optimiser that `optim` names."""
    return _OPTIMIZERS[config.ids].state
