"""What a run may choose beside plain Adam: another optimiser of ID rows, adaptive L2, decay of weights.

L2 is wrapped around the optimiser that is chosen, which knows nothing of it. Letters of shapes as in
trainer/ids/optimizers.py.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainer.comm import Comm
from trainer.config.options import OptimConfig
from trainer.ids.optimizers import Adam, RowOptimizer
from trainer.ids.shards import IdRows, StatePart
from trainer.optim import DenseOptimizer, Rates

_STEPS = StatePart("steps", "count")


class RowwiseAdagrad(RowOptimizer):
    """Adagrad with one sum a row, of the mean squared gradient over it (FBGEMM's EXACT_ROWWISE_ADAGRAD)."""

    state = (StatePart("sum", "number"),)

    def _move(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> Tensor:
        sum_Q = rows.parts["sum"].add_(gradient_QV.square().mean(1))
        step_Q = rates.ids_lr / sum_Q.sqrt().add_(self._config.eps)
        return weight_QV - gradient_QV * step_Q.unsqueeze(1)


class AdaptiveL2(RowOptimizer):
    """The adaptive L2 of DIN (Zhou et al., arXiv 1706.06978, section 5.1) on the rows that a step touches.

    id_l2 / n x the row is added to its gradient. n is the number of steps that touched it so far, this one included.
    DIN takes the row's samples in the whole data for n, which nobody knows while the data still come; counted in steps,
    the shares 1 / n of a pass over known data add up to one L2 a row, as theirs do before they are approximated, and a
    row's owner has the number at hand, the same for any number of ranks.
    """

    def __init__(self, inner: RowOptimizer, strength: float) -> None:
        self._inner, self._strength = inner, strength
        self.state, self.lags = (*inner.state, _STEPS), inner.lags

    def current(self, rows: IdRows) -> Tensor:
        return self._inner.current(rows)

    @torch.no_grad()
    def step(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> None:
        steps_Q = rows.parts[_STEPS.name] + 1
        share_Q = self._strength / steps_Q.to(weight_QV.dtype)
        self._inner.step(rows, weight_QV, gradient_QV + weight_QV * share_Q.unsqueeze(1), rates)
        rows.parts[_STEPS.name].copy_(steps_Q)

    def end_step(self, rates: Rates) -> None:
        self._inner.end_step(rates)

    def shared_state(self) -> dict[str, Tensor]:
        return self._inner.shared_state()

    def load_shared_state(self, state: Mapping[str, Tensor]) -> None:
        self._inner.load_shared_state(state)


class DecayedDense(DenseOptimizer):
    """Adam on dense parameters with decay of weights."""

    def __init__(self, comm: Comm, parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> None:
        super().__init__(comm, parameters, config)
        # Matrices alone: biases, slopes of PReLU and the like have one dimension.
        self._matrices: list[Tensor] = [value for value in self.parameters.values() if value.ndim > 1]

    @torch.no_grad()
    def step(self, rates: Rates, number: int) -> None:
        """Shrink matrices, as AdamW does, then take Adam's step."""
        if self._config.weight_decay:
            torch._foreach_mul_(self._matrices, 1 - rates.lr * self._config.weight_decay)
        super().step(rates, number)


def row_optimizer(config: OptimConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> RowOptimizer:
    """Make the optimiser of ID rows that `optim` names. Raises ConfigError where it cannot have these settings."""
    chosen = Adam(config, dtype, device) if config.ids == "adam" else RowwiseAdagrad(config)
    return AdaptiveL2(chosen, config.id_l2) if config.id_l2 else chosen


def state_of(config: OptimConfig) -> tuple[StatePart, ...]:
    """List what the optimiser that `optim` names keeps of a row."""
    return row_optimizer(config, torch.float32).state
