"""What a run may choose beside plain Adam: other optimisers of ID rows, adaptive L2, decay of weights.

L2 is wrapped around the optimiser that is chosen, which knows nothing of it. Letters of shapes as in
trainer/ids/optimizers.py.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainer.comm import Comm
from trainer.config.options import IdOptimizer, OptimConfig
from trainer.ids.optimizers import Adam, RowOptimizer
from trainer.ids.shards import IdRows, StatePart
from trainer.optim import DenseOptimizer, Rates

_STEPS = StatePart("steps", "count")


class RowwiseAdam(RowOptimizer):
    """Adam with one second moment a row, the running mean of the squared gradient over it.

    It is FBGEMM's PARTIAL_ROWWISE_ADAM. Steps that do not touch a row count for nothing: bias is corrected by those
    that do.
    """

    state = (StatePart("momentum", "vector"), StatePart("variance", "number"), _STEPS)

    def _move(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> Tensor:
        config, parts = self._config, rows.parts
        parts["steps"].add_(1)
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


class WrappedOptimizer(RowOptimizer):
    """Does what the optimiser inside does; what is wrapped around it overrides some of that."""

    def __init__(self, inner: RowOptimizer, state: tuple[StatePart, ...]) -> None:
        self.inner, self.state, self.lags = inner, state, inner.lags

    def current(self, rows: IdRows) -> Tensor:
        return self.inner.current(rows)

    def step(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> None:
        self.inner.step(rows, weight_QV, gradient_QV, rates)

    def end_step(self, rates: Rates) -> None:
        self.inner.end_step(rates)

    def shared_state(self) -> dict[str, Tensor]:
        return self.inner.shared_state()

    def load_shared_state(self, state: Mapping[str, Tensor]) -> None:
        self.inner.load_shared_state(state)


class AdaptiveL2(WrappedOptimizer):
    """The adaptive L2 of DIN (Zhou et al., arXiv 1706.06978, section 5.1) on the rows that a step touches.

    id_l2 / n x the row is added to its gradient. n is the number of steps that touched it so far, this one included.
    DIN takes the row's samples in the whole data for n, which nobody knows while the data still come; counted in steps,
    the shares 1 / n of a pass over known data add up to one L2 a row, as theirs do before they are approximated, and a
    row's owner has the number at hand, the same for any number of ranks.
    """

    def __init__(self, inner: RowOptimizer, strength: float) -> None:
        super().__init__(inner, inner.state if _STEPS in inner.state else (*inner.state, _STEPS))
        self._strength = strength

    @torch.no_grad()
    def step(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> None:
        steps_Q = rows.parts[_STEPS.name] + 1
        share_Q = self._strength / steps_Q.to(weight_QV.dtype)
        self.inner.step(rows, weight_QV, gradient_QV + weight_QV * share_Q.unsqueeze(1), rates)
        rows.parts[_STEPS.name].copy_(steps_Q)


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


_BY_NAME: Mapping[IdOptimizer, type[RowOptimizer]] = {
    "adam": Adam,
    "rowwise_adam": RowwiseAdam,
    "adagrad": Adagrad,
    "rowwise_adagrad": RowwiseAdagrad,
    "ftrl": Ftrl,
}


def row_optimizer(config: OptimConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> RowOptimizer:
    """Make the optimiser of ID rows that `optim` names. Raises ConfigError where it cannot have these settings."""
    chosen = Adam(config, dtype, device) if config.ids == "adam" else _BY_NAME[config.ids](config)
    return AdaptiveL2(chosen, config.id_l2) if config.id_l2 else chosen


def state_of(config: OptimConfig) -> tuple[StatePart, ...]:
    """List what the optimiser that `optim` names keeps of a row."""
    return row_optimizer(config, torch.float32).state
