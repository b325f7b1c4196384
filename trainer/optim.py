"""Adam for the dense parameters, which every rank holds: gradients are summed over ranks in one allreduce a step."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.comm import Comm
from trainer.errors import CheckpointError
from trainer.options import OptimConfig


@dataclass(frozen=True)
class AdamRates:
    """The numbers of one step of Adam, and of the regularisation of ID rows (trainer/tables.py)."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    id_l2: float = 0.0


def rates_at(config: OptimConfig, step: int) -> AdamRates:
    """The rates of step `step`, counted from zero: lr x lr_gamma ^ (step // lr_every)."""
    lr = config.lr * config.lr_gamma ** (step // config.lr_every)
    return AdamRates(lr, config.beta1, config.beta2, config.eps, config.id_l2)


class DenseOptimizer:
    """Adam on named parameters whose gradients are views of one flat buffer, so that a step has one allreduce.

    Reduction: sum over ranks. The loss of a rank is already divided by the samples of the global batch, so the sum is
    the gradient of the mean over it (tests/trainer/test_equivalence.py).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> None:
        self.parameters = dict(parameters)
        values = list(self.parameters.values())
        # One more element: the loss, so that its mean over the global batch costs no collective of its own.
        self._flat = torch.zeros(sum(p.numel() for p in values) + 1, dtype=values[0].dtype, device=values[0].device)
        self._adam = torch.optim.Adam(
            values, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
        )
        start = 0
        for parameter in values:
            parameter.grad = self._flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def zero_grad(self) -> None:
        """Call before backward, which adds to the gradients."""
        self._flat.zero_()

    def step(self, comm: Comm, rates: AdamRates, loss: Tensor) -> float:
        """Sums gradients and loss over ranks, moves the parameters; returns the summed loss, the same on every rank."""
        self._flat[-1] = loss.detach()
        comm.allreduce_sum_(self._flat, name="dense")
        for group in self._adam.param_groups:
            group["lr"] = rates.lr
        self._adam.step()
        return float(self._flat[-1])

    def state(self) -> dict[str, Tensor]:
        """Parameters by name, and adam/<name>/{exp_avg, exp_avg_sq, step}: the tensors themselves, not copies."""
        state: dict[str, Tensor] = {name: parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for part, value in self._moments(parameter).items():
                state[f"adam/{name}/{part}"] = value
        return state

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Adam's state of one parameter, made as Adam itself makes it where no step was taken yet."""
        moments: dict[str, Tensor] = self._adam.state[parameter]
        if not moments:
            moments["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            moments["exp_avg"] = torch.zeros_like(parameter)
            moments["exp_avg_sq"] = torch.zeros_like(parameter)
        return moments


def check_names(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless both have the same names with the same shapes."""
    missing, unknown = sorted(set(mine) - set(theirs)), sorted(set(theirs) - set(mine))
    if missing or unknown:
        raise CheckpointError(
            f"the checkpoint is of another model: it lacks {len(missing)} tensors, {missing[:5]}, "
            f"and has {len(unknown)} too many, {unknown[:5]}; use its run's configuration"
        )
    for name, value in mine.items():
        if value.shape != theirs[name].shape:
            raise CheckpointError(
                f"{name} has shape {tuple(theirs[name].shape)} in the checkpoint and {tuple(value.shape)} in this run; "
                "use its run's configuration"
            )
