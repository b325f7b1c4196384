"""Between two linear layers of a network: batch norm, an activation, dropout; all exact over any number of ranks.

What needs all rows of a step takes them of the global batch. What is drawn depends on a sample's place in it, not on
the rank. Letters here: M rows on this rank, W units of a layer.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from featurestore.lookup.embedding import PReLU, on_device
from trainer.comm import Comm, SoloComm
from trainer.config.options import ModelConfig
from trainer.models.id_dropout import random_words

# Of FuxiCTR and torch: eps and the share of a step in the running values.
_NORM, _DICE = (1e-5, 0.1), (1e-9, 0.01)


@dataclass
class StepPlace:
    """Where in the training this rank's rows are. The engine sets it; layers that need it have the same object."""

    comm: Comm = dataclasses.field(default_factory=SoloComm)
    seed: int = 0
    step: int = 0
    place_B: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    """Place of each sample in the global batch."""


class HiddenLayers:
    """Makes the modules that follow the linear layers of one model, as its configuration says."""

    def __init__(self, config: ModelConfig, place: StepPlace) -> None:
        self._config, self._place = config, place
        self._num_norms = self._num_dropouts = 0

    def activation(self, width: int) -> nn.Module:
        """Make `model.activation` for a layer of `width` units."""
        match self._config.activation:
            case "relu":
                return nn.ReLU()
            case "prelu":
                return PReLU()
            case "dice":
                return Dice(width, self._norm(width, *_DICE, affine=False))

    def after(self, layer: int, width: int) -> Iterator[tuple[str, nn.Module]]:
        """Return names and modules that follow linear layer number `layer`.

        The activation's name is the same with any setting: a checkpoint of a model without dropout fits one with it.
        """
        if self._config.batch_norm:
            yield f"norm{layer}", self._norm(width, *_NORM, affine=True)
        yield str(2 * layer + 1), self.activation(width)
        if self._config.dropout:
            self._num_dropouts += 1
            yield f"dropout{layer}", PlacedDropout(self._config.dropout, self._place, self._num_dropouts)

    def _norm(self, width: int, eps: float, momentum: float, *, affine: bool) -> "GlobalBatchNorm":
        self._num_norms += 1
        name = f"step.norm.{self._num_norms}"
        return GlobalBatchNorm(width, self._place, name, eps=eps, momentum=momentum, affine=affine)


class GlobalBatchNorm(nn.Module):
    """Batch norm with mean and variance over the rows of the global batch, however they are spread over ranks.

    One allreduce forward (number of rows, sums, sums of squares) and one backward: every rank's rows have a part in the
    gradient through mean and variance. In evaluation running values are used, and no collective.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, place: StepPlace, name: str, *, eps: float, momentum: float, affine: bool) -> None:
        super().__init__()
        self._place, self._name, self._eps, self._momentum = place, name, eps, momentum
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, input_MW: Tensor) -> Tensor:
        """Return the normalised inputs, (M, W)."""
        mean_W, variance_W = self._of_step(input_MW) if self.training else (self.running_mean, self.running_var)
        output_MW = (input_MW - mean_W) * torch.rsqrt(variance_W + self._eps)
        if self.weight is None or self.bias is None:
            return output_MW
        return output_MW * self.weight + self.bias

    def _of_step(self, input_MW: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance over all ranks' rows; move the running values, whose variance is unbiased."""
        start_W = self.running_mean.clone()  # sums around it lose fewer digits
        shifted_MW = input_MW - start_W
        count_1 = input_MW.new_full((1,), len(input_MW))
        parts = [count_1, shifted_MW.sum(0), shifted_MW.square().sum(0)]
        sums: Tensor = _SumOverRanks.apply(torch.cat(parts), self._place.comm, self._name)  # type: ignore[no-untyped-call]
        count = sums[0].detach()
        mean_W, square_W = (sums[1:] / count.clamp_min(1)).chunk(2)
        variance_W = (square_W - mean_W.square()).clamp_min(0)
        share = (count > 0).to(count.dtype) * self._momentum  # without rows nothing moves
        unbiased_W = variance_W.detach() * (count / (count - 1).clamp_min(1))
        self.running_mean.lerp_(start_W + mean_W.detach(), share)
        self.running_var.lerp_(unbiased_W, share)
        return start_W + mean_W, variance_W


class Dice(nn.Module):
    """p x + (1 - p) alpha x, p = sigmoid of the standardised x, alpha a number for each unit, 0 at first.

    Zhou et al., KDD 2018, section 5.3; eps 1e-9 and running values that move by a hundredth, as in FuxiCTR.
    """

    def __init__(self, width: int, norm: GlobalBatchNorm) -> None:
        super().__init__()
        self.norm = norm
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, input_MW: Tensor) -> Tensor:
        """Return the activations, (M, W)."""
        share_MW = torch.sigmoid(self.norm(input_MW))
        return input_MW * torch.lerp(self.alpha, torch.ones_like(self.alpha), share_MW)


class PlacedDropout(nn.Module):
    """Dropout whose units depend on (seed, step, place of the sample in the global batch, layer) alone."""

    def __init__(self, rate: float, place: StepPlace, layer: int) -> None:
        super().__init__()
        self._place, self._layer = place, layer
        self._below = round(rate * 65536)  # drawn numbers have 16 bits

    def forward(self, input_BW: Tensor) -> Tensor:
        """Return the inputs, (B, W): in training, dropped units are 0 and the others grow by 1 / (1 - rate)."""
        if not self.training or len(input_BW) == 0:
            return input_BW
        place, width = self._place, input_BW.shape[1]
        words = -(-width // 4)  # of 64 bits a sample
        stream = f"{place.seed}/dropout/{self._layer}/{place.step}"
        drawn = random_words(stream, (place.place_B[:, None] * words + np.arange(words)).ravel())
        kept_BW = on_device(drawn.view("<u2").reshape(len(input_BW), -1)[:, :width] >= self._below, input_BW.device)
        return input_BW * (kept_BW.to(input_BW.dtype) * (1 / (1 - self._below / 65536)))


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks; backward, the sum over ranks of what each rank's loss wants of it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, comm: Comm, name: str) -> Tensor:
        ctx.comm, ctx.name = comm, name
        return comm.allreduce_sum_(values.clone(), name=name)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.comm.allreduce_sum_(gradient.clone(), name=f"{ctx.name}.gradients"), None, None
