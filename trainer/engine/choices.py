"""What a run may choose beside plain Adam: other optimisers of ID rows, adaptive L2, averages of all parameters.

L2 and averages are wrapped around the optimiser that is chosen, which knows of neither. Letters of shapes as in
trainer/ids/optimizers.py.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from trainer.comm import Comm
from trainer.config.options import IdOptimizer, OptimConfig
from trainer.errors import CheckpointError
from trainer.ids.optimizers import SHARED_STATE, Adam, RowOptimizer
from trainer.ids.shards import IdRows, StatePart
from trainer.optim import DenseOptimizer, Rates

_STEPS = StatePart("steps", "count")
_AVERAGED_STEPS = f"{SHARED_STATE}averaged_steps"
_LAG = StatePart("average_lag", "vector")
"""Average minus weight, as the last step that touched the row left them: zero of rows that none has touched."""
_AVERAGED_AT = StatePart("averaged_at", "count")
TRAINED = "trained/"
"""How names of what the last step left begin in a checkpoint, where those of the parameters have their averages."""


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


class StepAverage:
    """How far an average moves in each step, and how much of it is left after many.

    Polynomial-decay averaging (Shamir and Zhang, ICML 2013, arXiv 1212.1824, section 4): in step n the average goes
    (g + 1) / (n + g) of the way to the parameters as that step leaves them. So a step counts the less the longer it is
    ago, and about the last 1 / (g + 1) of all steps count, however many there are. After the first step the average
    is its parameters; with g = 0 all steps count alike.
    """

    def __init__(self, share: float) -> None:
        """`share`: 1 / (g + 1), in (0, 1]."""
        self._gamma = 1 / share - 1
        self.num_steps = 0

    def weight_in(self, step: int) -> float:
        """Return how far the average goes in a step, the first of which is 1."""
        return (self._gamma + 1) / (step + self._gamma)

    def kept(self, since_Q: Tensor) -> Tensor:
        """Compute the share that is left now of a distance between average and parameter after step `since` (Q,).

        The parameter has stayed as it is since then: the product of 1 - weight over the steps in between, (Q,) in
        float64.

        With Gamma functions, so that it costs the same however many they are. Step 0, before the first, counts as 1.
        """
        now = torch.full((), max(1, self.num_steps), dtype=torch.float64, device=since_Q.device)
        return torch.exp(self._log_left(now) - self._log_left(since_Q.double().clamp_(min=1)))

    def _log_left(self, step: Tensor) -> Tensor:
        return torch.lgamma(step) - torch.lgamma(step + self._gamma + 1)


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


class RowAverages(WrappedOptimizer):
    """Averages of rows next to their weights: of each row how far its average is away, and since which step.

    Where a row was last touched some steps ago, it counts in the average as it is now for all of these.
    """

    def __init__(self, inner: RowOptimizer, share: float) -> None:
        super().__init__(inner, (*inner.state, _LAG, _AVERAGED_AT))
        self.lags = True
        self._average, self._is_read = StepAverage(share), False

    def read(self, rows: IdRows) -> Tensor:
        current_QV = self.current(rows)
        return self._averages(rows, current_QV) if self._is_read else current_QV

    @contextmanager
    def averaged(self) -> Iterator[None]:
        before, self._is_read = self._is_read, True
        try:
            yield
        finally:
            self._is_read = before

    @torch.no_grad()
    def step(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> None:
        average_QV, number = self._averages(rows, weight_QV), self._average.num_steps + 1
        self.inner.step(rows, weight_QV, gradient_QV, rates)
        rows.parts[_LAG.name].copy_((average_QV - rows.weight) * (1 - self._average.weight_in(number)))
        rows.parts[_AVERAGED_AT.name].fill_(number)

    def end_step(self, rates: Rates) -> None:
        self.inner.end_step(rates)
        self._average.num_steps += 1

    def shared_state(self) -> dict[str, Tensor]:
        return {_AVERAGED_STEPS: torch.tensor(self._average.num_steps)} | self.inner.shared_state()

    def load_shared_state(self, state: Mapping[str, Tensor]) -> None:
        if _AVERAGED_STEPS not in state:
            raise CheckpointError("the checkpoint has no averages of ID rows; set optim.average_share as it was")
        self._average.num_steps = int(state[_AVERAGED_STEPS])
        self.inner.load_shared_state(state)

    def _averages(self, rows: IdRows, weight_QV: Tensor) -> Tensor:
        """Compute the averages (Q, V) of these rows, whose weights now are `weight_QV`."""
        kept_Q = self._average.kept(rows.parts[_AVERAGED_AT.name]).to(weight_QV.dtype)
        return weight_QV + (rows.weight + rows.parts[_LAG.name] - weight_QV) * kept_Q.unsqueeze(1)


class ChosenDense(DenseOptimizer):
    """Adam on dense parameters with what a run may choose beside it: decay of weights, and averages."""

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

    def begin(self) -> None:
        """Take note that the parameters have got other values, before the first step."""

    def averaged(self) -> AbstractContextManager[None]:
        """Have averages in place of the parameters in the block, if there are averages; no step is done in it."""
        return nullcontext()


class AveragedDense(ChosenDense):
    """The same, and averages of the parameters."""

    def __init__(self, comm: Comm, parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> None:
        super().__init__(comm, parameters, config)
        self._average = StepAverage(config.average_share)
        self._averages = {name: value.detach().clone() for name, value in self.parameters.items()}

    @torch.no_grad()
    def step(self, rates: Rates, number: int) -> None:
        super().step(rates, number)
        values: list[Tensor] = list(self.parameters.values())
        torch._foreach_lerp_(list(self._averages.values()), values, self._average.weight_in(number))

    @torch.no_grad()
    def begin(self) -> None:
        """Make the averages equal to the parameters, which have got other values before the first step."""
        for name, average in self._averages.items():
            average.copy_(self.parameters[name])

    @contextmanager
    @torch.no_grad()
    def averaged(self) -> Iterator[None]:
        trained = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        try:
            for name, average in self._averages.items():
                self.parameters[name].copy_(average)
            yield
        finally:
            for name, value in trained.items():
                self.parameters[name].copy_(value)

    def state(self) -> dict[str, Tensor]:
        """Return averages by the parameters' names, parameters as trained/<name>, and Adam's state."""
        trained = {f"{TRAINED}{name}": parameter.detach() for name, parameter in self.parameters.items()}
        return trained | self._averages | self.moments()


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
    if config.id_l2:
        chosen = AdaptiveL2(chosen, config.id_l2)
    return RowAverages(chosen, config.average_share) if config.average_share else chosen


def state_of(config: OptimConfig) -> tuple[StatePart, ...]:
    """List what the optimiser that `optim` names keeps of a row."""
    return row_optimizer(config, torch.float32).state


def dense_optimizer(comm: Comm, parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> ChosenDense:
    """Make the optimiser of dense parameters that `optim` names."""
    return (AveragedDense if config.average_share else ChosenDense)(comm, parameters, config)
