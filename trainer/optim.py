"""The optimiser of dense parameters, and the reduction of their gradients."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from trainer.comm import Comm
from trainer.config import OptimConfig

BETA1, BETA2 = 0.9, 0.999
"""Adam's weights of the past in the running means of gradients, and of their squares."""
_IN_FRONT = 2


@dataclass(frozen=True)
class Rates:
    """The learning rates of one step, of dense parameters and of ID rows."""

    lr: float
    ids_lr: float


def rates_at(config: OptimConfig, step: int, num_plateaus: int = 0) -> Rates:
    """Return the rates of step `step`, from zero on: lr x lr_gamma ^ (step // lr_every), less while it warms up.

    `num_plateaus`: evaluations so far that were no better than all before, each of which is a plateau_gamma more.
    """
    share = config.lr_gamma ** (step // config.lr_every) * config.plateau_gamma**num_plateaus
    if step < config.warmup_steps:
        share *= (step + 1) / config.warmup_steps
    return Rates(config.lr * share, config.alpha * share)


class DenseOptimizer:
    """Adam on named parameters whose gradients are views of one flat buffer.

    Reduction: sum over ranks. The loss of a rank is already divided by the samples of the global batch, so the sum is
    the gradient of the mean over it (tests/trainer/equivalence/test_equivalence.py). One allreduce for each first part
    of the names: the worker's gradients travel as soon as backward has made the last of them, while it continues
    through E.
    """

    def __init__(self, comm: Comm, parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> None:
        self.parameters = dict(parameters)
        values = list(self.parameters.values())
        # In front: the loss and the number of failures, so that their sums over ranks cost no collective of their own.
        size = _IN_FRONT + sum(value.numel() for value in values)
        self._flat = torch.zeros(size, dtype=values[0].dtype, device=values[0].device)
        self._config = config
        # The function below torch.optim.Adam: the class imports torch's compiler, a second and a half of every start.
        self._moments = {name: _moments_of(parameter) for name, parameter in self.parameters.items()}
        self._reductions = _reductions(comm, self.parameters, self._flat)

    def zero_grad(self) -> None:
        """Clear the gradients, before backward adds to them."""
        self._flat.zero_()
        for each in self._reductions:
            each.reset()

    def note(self, loss: Tensor, failures: Tensor | None = None) -> None:
        """Take this rank's loss, and whether this step has failed, before backward.

        They are summed over ranks with the first gradients.
        """
        self._flat[0] = loss.detach()
        if failures is not None:
            self._flat[1] = failures

    def start_reduction(self) -> None:
        """Start the sums that have not started yet; every rank calls it after backward."""
        for each in self._reductions:
            each.start()

    def outcome(self) -> tuple[float, int]:
        """Return the loss and the number of failures, summed over ranks.

        It is the one time in a step that the host waits for the device. The first gradients are there as well then.
        """
        self._reductions[0].finish()
        loss, failures = self._flat[:_IN_FRONT].tolist()
        return loss, int(failures)

    def finish_reduction(self) -> None:
        """Wait until all gradients are the sums over ranks."""
        for each in self._reductions:
            each.finish()

    @torch.no_grad()
    def step(self, rates: Rates, number: int) -> None:
        """Move the parameters in step `number`, the first of which is 1."""
        moments = list(self._moments.values())
        values: list[Tensor] = list(self.parameters.values())
        adam(
            values,
            [value.grad for value in values if value.grad is not None],
            [each["exp_avg"] for each in moments],
            [each["exp_avg_sq"] for each in moments],
            [],
            [each["step"] for each in moments],
            fused=True,
            amsgrad=False,
            beta1=BETA1,
            beta2=BETA2,
            lr=rates.lr,
            weight_decay=0.0,
            eps=self._config.eps,
            maximize=False,
        )

    def state(self) -> dict[str, Tensor]:
        """Return parameters by name, and Adam's state: the tensors, not copies."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()} | self.moments()

    def moments(self) -> dict[str, Tensor]:
        """Return Adam's state, as adam/<name>/{exp_avg, exp_avg_sq, step}."""
        return {f"adam/{name}/{part}": value for name, each in self._moments.items() for part, value in each.items()}


def _moments_of(parameter: nn.Parameter) -> dict[str, Tensor]:
    """Make the state that Adam begins with."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    value = parameter.detach()
    return {"step": step, "exp_avg": torch.zeros_like(value), "exp_avg_sq": torch.zeros_like(value)}


class _Reduction:
    """The allreduce of neighbouring gradients; begins by itself when backward has made all of them."""

    def __init__(self, comm: Comm, name: str, values: Tensor, parameters: Sequence[nn.Parameter], last: bool) -> None:
        self._comm, self._name, self._values, self._count = comm, name, values, len(parameters)
        self._waiting = 0
        self._finish: Callable[[], object] | None = None
        self._is_done = False
        if not last and comm.size > 1:  # backward ends with the last part
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]

    def reset(self) -> None:
        self._waiting, self._finish, self._is_done = self._count, None, False

    def start(self) -> None:
        if self._finish is None:
            self._finish = self._comm.start_allreduce_sum_(self._values, name=self._name)

    def finish(self) -> None:
        assert self._finish is not None
        if not self._is_done:
            self._finish()
            self._is_done = True

    def _note(self, _: Tensor) -> None:
        self._waiting -= 1
        if self._waiting == 0:
            self.start()


def _reductions(comm: Comm, parameters: Mapping[str, nn.Parameter], flat: Tensor) -> list[_Reduction]:
    """Lay the gradients into `flat`, one by one behind the reserved front, and cut it by the first part of the
    names."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        parts.setdefault(name.partition(".")[0], []).append(parameter)
    reductions, start = [], _IN_FRONT
    for number, (part, members) in enumerate(parts.items()):
        first, last = (start if number else 0), number == len(parts) - 1
        for parameter in members:
            parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        reductions.append(_Reduction(comm, f"step.dense.{part}", flat[first:start], members, last))
    return reductions
