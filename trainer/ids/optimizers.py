"""Optimisers of ID rows, and the rows they update; decay of rows not seen is exact.

Q rows touched, V numbers in each; all work on copies of these rows alone. The row's `gradient_QV` is the sum over all
ranks, of the mean loss over the global batch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from trainer.config.options import IdOptimizer, OptimConfig
from trainer.errors import CheckpointError
from trainer.ids.drift import Drift
from trainer.optim import Rates, StepAverage

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
_STEPS = StatePart("steps", "count")
_RATES = f"{SHARED_STATE}learning_rates"
_AVERAGED_STEPS = f"{SHARED_STATE}averaged_steps"
_LAG = StatePart("average_lag", "vector")
"""Average minus weight, as the last step that touched the row left them: zero of rows that none has touched."""
_AVERAGED_AT = StatePart("averaged_at", "count")


class RowOptimizer:
    """Leaves rows as they are: what evaluation needs. One object serves all tables of a rank."""

    state: tuple[StatePart, ...] = ()
    drifts: ClassVar[bool] = False
    """Whether steps move rows that they do not touch."""

    def __init__(self, config: OptimConfig) -> None:
        self._config = config
        self.state = type(self).state_with(config)
        self.average = StepAverage(config.average_share) if _LAG in self.state else None
        self.reads_average = False
        """Whether `read` gives averages."""

    @classmethod
    def state_with(cls, config: OptimConfig) -> tuple[StatePart, ...]:
        """List the state that is kept of a row together with its weights.

        Adaptive L2 needs the number of its steps, an average how far it is away.
        """
        if not cls.state:
            return ()
        counts = (_STEPS,) if config.id_l2 and _STEPS not in cls.state else ()
        averages = (_LAG, _AVERAGED_AT) if config.average_share else ()
        return (*cls.state, *counts, *averages)

    @property
    def lags(self) -> bool:
        """Whether weights in memory may be others than `result`."""
        return self.drifts or self.average is not None

    def current(self, rows: IdRows) -> Tensor:
        """Return the weights (Q, V) of these rows as they are now; a view where no step moves rows beside its own."""
        return rows.weight

    def result(self, rows: IdRows) -> Tensor:
        """Return what these rows are worth outside of training (Q, V): averages where they have such, else weights.

        Where a row was last touched some steps ago, it counts in the average as it is now for all of these.
        """
        weight_QV = self.current(rows)
        return weight_QV if self.average is None else self._averages(rows, weight_QV, self.average)

    def read(self, rows: IdRows) -> Tensor:
        """Return what a batch is to see of these rows (Q, V)."""
        return self.result(rows) if self.reads_average else self.current(rows)

    @torch.no_grad()
    def step(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> None:
        """Move copies of the rows that the step touches, whose weights now are `weight_QV`, and their state.

        With `id_l2`, the adaptive L2 of DIN (Zhou et al., arXiv 1706.06978, section 5.1): id_l2 / n x the row is added
        to its gradient, in steps that touch the row alone. n is the number of steps that touched it so far, this one
        included. DIN takes the row's samples in the whole data for n, which nobody knows while the data still come;
        counted in steps, the shares 1 / n of a pass over known data add up to one L2 a row, as theirs do before they
        are approximated, and a row's owner has the number at hand, the same for any number of ranks.
        """
        average_QV = None if self.average is None else self._averages(rows, weight_QV, self.average)
        if _STEPS in self.state:
            rows.parts[_STEPS.name].add_(1)
        if self._config.id_l2:
            share_Q = self._config.id_l2 / rows.parts[_STEPS.name].to(weight_QV.dtype)
            gradient_QV = gradient_QV + weight_QV * share_Q.unsqueeze(1)
        weight_QV = self._move(rows, weight_QV, gradient_QV, rates)
        if self.average is not None and average_QV is not None:
            number = self.average.num_steps + 1
            rows.parts[_LAG.name].copy_((average_QV - weight_QV) * (1 - self.average.weight_in(number)))
            rows.parts[_AVERAGED_AT.name].fill_(number)
        rows.weight.copy_(weight_QV)

    def end_step(self, rates: Rates) -> None:
        """End the step, with or without rows; every rank calls it."""
        if self.average is not None:
            self.average.num_steps += 1

    def restart(self) -> None:
        """Begin all rows anew, with zero as their state."""
        if self.average is not None:
            self.average.num_steps = 0

    def shared_state(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs beside the rows: the same on every rank."""
        return {} if self.average is None else {_AVERAGED_STEPS: torch.tensor(self.average.num_steps)}

    def load_shared_state(self, state: Mapping[str, Tensor]) -> None:
        """Take `shared_state` out of `state`. Raises CheckpointError where it is not there."""
        if self.average is not None:
            if _AVERAGED_STEPS not in state:
                raise CheckpointError("the checkpoint has no averages of ID rows; set optim.average_share as it was")
            self.average.num_steps = int(state[_AVERAGED_STEPS])

    def _averages(self, rows: IdRows, weight_QV: Tensor, average: StepAverage) -> Tensor:
        """Compute the averages (Q, V) of these rows, whose weights now are `weight_QV`."""
        kept_Q = average.kept(rows.parts[_AVERAGED_AT.name]).to(weight_QV.dtype)
        return weight_QV + (rows.weight + rows.parts[_LAG.name] - weight_QV) * kept_Q.unsqueeze(1)

    def _move(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> Tensor:
        """Change the state of these rows in place; return the new weights."""
        raise AssertionError("these rows are read and not trained")


class Adam(RowOptimizer):
    """Adam with moments of each weight, which shrink in every step: as torch.optim.Adam on the whole table.

    A row is moved by the steps that touch it; when it is read, it makes up for the others. Its
    weight in memory is that after step `last_step`, its last; what a lookup, a checkpoint or an export gets is newer.
    """

    state = (StatePart("momentum", "vector"), StatePart("variance", "vector"), StatePart("last_step", "count"))
    drifts = True

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
        super().end_step(rates)
        self._drift.add_step(rates.ids_lr)

    def restart(self) -> None:
        super().restart()
        self._drift.restart()

    def shared_state(self) -> dict[str, Tensor]:
        return super().shared_state() | {_RATES: torch.tensor(self._drift.rates, dtype=torch.float64)}

    def load_shared_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_shared_state(state)
        if _RATES not in state:
            raise CheckpointError("the checkpoint has no learning rates of ID rows; set optim.ids as it was")
        self._drift.resume(state[_RATES].tolist())


class RowwiseAdam(RowOptimizer):
    """Adam with one second moment a row, the running mean of the squared gradient over it.

    It is FBGEMM's PARTIAL_ROWWISE_ADAM. Steps that do not touch a row count for nothing: bias is corrected by those
    that do.
    """

    state = (StatePart("momentum", "vector"), StatePart("variance", "number"), _STEPS)

    def _move(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> Tensor:
        config, parts = self._config, rows.parts
        momentum_QV = parts["momentum"].lerp_(gradient_QV, 1 - config.beta1)
        variance_Q = parts["variance"].lerp_(gradient_QV.square().mean(1), 1 - config.beta2)
        count_Q = parts["steps"].to(variance_Q.dtype)
        deviation_Q = (variance_Q / (1 - config.beta2**count_Q)).sqrt_().add_(config.eps)
        step_Q = rates.ids_lr / (1 - config.beta1**count_Q) / deviation_Q
        return weight_QV - momentum_QV * step_Q.unsqueeze(1)


class Adagrad(RowOptimizer):
    """Adagrad (Duchi et al., JMLR 2011), as torch.optim.Adagrad: the step shrinks with the sum of squared gradients."""

    state = (StatePart("sum", "vector"),)

    def _move(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> Tensor:
        sum_QV = rows.parts["sum"].addcmul_(gradient_QV, gradient_QV)
        return torch.addcdiv(weight_QV, gradient_QV, sum_QV.sqrt().add_(self._config.eps), value=-rates.ids_lr)


class RowwiseAdagrad(RowOptimizer):
    """Adagrad with one sum a row, of the mean squared gradient over it (FBGEMM's EXACT_ROWWISE_ADAGRAD)."""

    state = (StatePart("sum", "number"),)

    def _move(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> Tensor:
        sum_Q = rows.parts["sum"].add_(gradient_QV.square().mean(1))
        step_Q = rates.ids_lr / sum_Q.sqrt().add_(self._config.eps)
        return weight_QV - gradient_QV * step_Q.unsqueeze(1)


FTRL_BETA = 1.0
"""As McMahan et al. take it; with 0, a weight without any gradient so far would be 0 / 0."""


class Ftrl(RowOptimizer):
    """FTRL-Proximal by coordinate (McMahan et al., "Ad Click Prediction", KDD 2013, algorithm 1, without L1 and L2).

    alpha is optim.ids_lr itself: a weight is a function of alpha and of the sums, so a schedule would move weights
    without a gradient. The sums of a row begin so that its first value is theirs.
    """

    state = (StatePart("linear", "vector"), StatePart("sum", "vector"))

    def _move(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> Tensor:
        alpha, linear_QV, sum_QV = self._config.alpha, rows.parts["linear"], rows.parts["sum"]
        started_QV = weight_QV * -(FTRL_BETA / alpha)
        is_new_Q = ~(sum_QV.any(1) | linear_QV.any(1))
        linear_QV.copy_(torch.where(is_new_Q.unsqueeze(1), started_QV, linear_QV))
        root_QV = sum_QV.sqrt()
        sum_QV.addcmul_(gradient_QV, gradient_QV)
        new_root_QV = sum_QV.sqrt()
        linear_QV.add_(gradient_QV).addcmul_(new_root_QV - root_QV, weight_QV, value=-1 / alpha)
        return -linear_QV / ((new_root_QV + FTRL_BETA) / alpha)


_PLAIN: Mapping[IdOptimizer, type[RowOptimizer]] = {
    "rowwise_adam": RowwiseAdam,
    "adagrad": Adagrad,
    "rowwise_adagrad": RowwiseAdagrad,
    "ftrl": Ftrl,
}


def row_optimizer(config: OptimConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> RowOptimizer:
    """Make the optimiser that optim.ids names. Raises ConfigError where it cannot have these settings."""
    if config.ids == "adam":
        return Adam(config, dtype, device)
    return _PLAIN[config.ids](config)


def state_of(config: OptimConfig) -> Sequence[StatePart]:
    """List what the optimiser that optim.ids names keeps of a row."""
    return (Adam if config.ids == "adam" else _PLAIN[config.ids]).state_with(config)


def _power(beta: float, steps_Q: Tensor, dtype: torch.dtype) -> Tensor:
    """beta^steps (Q, 1), by float64's exp, which is quick; a base rounded to float32 would tell after some steps."""
    return torch.exp(steps_Q * (math.log(beta) if beta else -math.inf)).to(dtype).unsqueeze(1)
