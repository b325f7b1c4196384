"""A network that torchvision knows as its own, `tiny:last`: built, compiled and computed in milliseconds."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision.models._api import Weights, WeightsEnum, register_model
from torchvision.transforms._presets import ImageClassification

TINY = "tiny:last"
SIDE = 32  # pixels


class Tiny_Weights(WeightsEnum):  # noqa: N801 (torchvision's way)
    DEFAULT = Weights(url="", transforms=partial(ImageClassification, crop_size=SIDE, resize_size=SIDE), meta={})


class Tiny(nn.Module):
    """What int8 may meet: pixels, a norm, a pool, convolutions that share an input, a depthwise one, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.plain = nn.Conv2d(8, 8, 1)
        self.last = nn.Linear(8 * 8 * 8, 12)

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        pooled = self.pool(self.norm(self.first(pixels_BCHW)).relu())
        features_BD: torch.Tensor = self.last((self.depthwise(pooled) + self.plain(pooled)).flatten(1))
        return features_BD


@register_model()
def tiny(*, weights: Tiny_Weights | None = None, progress: bool = True, **_: Any) -> Tiny:
    return Tiny()


tiny.__module__ = "torchvision.models.tiny"  # where `list_models` looks
