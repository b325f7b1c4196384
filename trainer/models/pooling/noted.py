"""Attention weights of a forward pass, noted during it: the pass itself is as without, bit for bit."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from trainer.models.ctr import CtrModel
from trainer.models.pooling.attention import AttentivePooling, PairWeights
from trainer.models.pooling.transformer import TransformerPooling


@contextlib.contextmanager
def noted_weights(model: CtrModel) -> Iterator[dict[str, PairWeights]]:
    """Note the weights that a model's aggregators give to behaviours: of each field, those of the newest pass.

    Fields whose aggregator has no weights (sum, mean, max, concat) have no entry. Costs a second pass of the
    aggregators.
    """
    found: dict[str, PairWeights] = {}
    with contextlib.ExitStack() as hooks:
        for name, aggregator in model.aggregators.items():
            if isinstance(aggregator, AttentivePooling | TransformerPooling):
                hooks.callback(aggregator.register_forward_pre_hook(_Note(name, found)).remove)
        yield found


class _Note:
    """Called with what an aggregator is about to be called with."""

    def __init__(self, name: str, found: dict[str, PairWeights]) -> None:
        self._name, self._found = name, found

    def __call__(self, aggregator: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(aggregator, AttentivePooling | TransformerPooling)
        with torch.no_grad():
            self._found[self._name] = aggregator.weights(*arguments)
