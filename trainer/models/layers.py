"""Layers: the fields that a model uses, MLPs, and operations on rows of uneven length.

What is drawn depends on a sample's place in the global batch, not on the rank. Letter here: W units of a layer.

Sums of segments are `embedding_bag`s: they take rows one after the other on every device, so a sum has the same bits.
Under torch.export, which has no compiled form of it, what has uneven lengths goes by the row of each value instead.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featurestore.keys import Int64Array, UInt64Array, splitmix64, stream_start
from featurestore.lookup.ondevice import PReLU, applied, on_device
from trainer.config import ModelConfig
from trainer.errors import ConfigError
from trainer.exchange.vectors import EvenLengths, FieldVectors, Lengths, sum_in_order, take_rows
from trainer.problems import Problem
from trainer.schema.fields import Field, Schema, Side

_SIDES: dict[str, frozenset[Side]] = {
    "none": frozenset(),
    "ad": frozenset({"ad"}),
    "behavior": frozenset({"user"}),
    "both": frozenset({"user", "ad"}),
}


def used_fields(schema: Schema, config: ModelConfig) -> tuple[Field, ...]:
    """Return the fields that the model uses: all ID and dense ones, and content ones by `images`.

    Logistic regression has one weight for each id: ID fields are one wide there, whatever the schema says.
    Raises ConfigError where `images` asks for a side on which the schema has no content field.
    """
    wanted = _SIDES[config.images]
    for side in sorted(wanted):
        if not any(field.kind == "content" and field.side == side for field in schema.fields):
            raise ConfigError(Problem.NO_CONTENT_FIELD, config.images, side)
    fields = tuple(f for f in schema.fields if f.kind != "content" or f.side in wanted)
    if config.base == "lr":
        fields = tuple(f.model_copy(update={"width": 1}) if f.is_id else f for f in fields)
    _check_names(fields)
    if not any(field.is_id or field.kind == "content" for field in fields):
        raise ConfigError(Problem.NO_FIELD_TO_LEARN)
    return fields


def _check_names(fields: tuple[Field, ...]) -> None:
    """Refuse names of content fields and stores that cannot name modules: a few are taken, and dots divide."""
    taken = nn.ModuleDict()
    for field in fields:
        names = {"name": field.name, "store": field.store_name} if field.kind == "content" else {}
        for what, name in names.items():
            if "." in name or hasattr(taken, name):
                raise ConfigError(Problem.NAME_OF_NO_PART, field.name, what, name, name.replace(".", "_"))


def width_of(field: Field, config: ModelConfig) -> int:
    """Return the width of a field's vectors: the schema's, else the model's for its kind; dense: numbers a row."""
    if field.width is not None:
        return field.width
    if field.kind == "dense":
        return 1
    return config.visual_width if field.kind == "content" else config.id_width


@dataclass
class StepPlace:
    """Place of this rank's rows in the training. The engine sets it; layers that need it have the same object."""

    seed: int = 0
    step: int = 0
    place_B: Int64Array = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    """Place of each sample in the global batch."""


class HiddenLayers:
    """Makes the modules that follow the linear layers of one model, as its configuration says."""

    def __init__(self, config: ModelConfig, place: StepPlace) -> None:
        self._config, self._place = config, place
        self._num_dropouts = 0

    def activation(self) -> nn.Module:
        """Make `model.activation`."""
        return PReLU() if self._config.activation == "prelu" else nn.ReLU()

    def after(self, layer: int) -> Iterator[tuple[str, nn.Module]]:
        """Return names and modules that follow linear layer number `layer`.

        The activation's name is the same with any setting: a checkpoint of a model without dropout fits one with it.
        """
        yield str(2 * layer + 1), self.activation()
        if self._config.dropout:
            self._num_dropouts += 1
            yield f"dropout{layer}", PlacedDropout(self._config.dropout, self._place, self._num_dropouts)


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


class Mlp(nn.Sequential):
    """Fully connected layers with the layers of `hidden` between them; the last one is linear, or `activated` too."""

    def __init__(self, widths: Sequence[int], hidden: HiddenLayers, *, activated: bool = False) -> None:
        super().__init__()
        for layer, (inner, outer) in enumerate(itertools.pairwise(widths)):
            self.add_module(str(2 * layer), nn.Linear(inner, outer))
            if activated or layer < len(widths) - 2:
                for name, module in hidden.after(layer):
                    self.add_module(name, module)


def value_rows(field: FieldVectors, at_N: Tensor | None = None) -> Tensor:
    """Return the vector of each value of a field, or of those at these places, times its weight, (N, V)."""
    index_N, weights_N = field.index_N, field.weights_N
    if at_N is not None:
        index_N = index_N.index_select(0, at_N)
        weights_N = None if weights_N is None else weights_N.index_select(0, at_N)
    rows_NV = take_rows(field.vectors_UV, index_N)
    return rows_NV if weights_N is None else rows_NV * weights_N.unsqueeze(1)


def expand_rows(rows_M: Tensor, lengths_M: Tensor, num_values: int) -> Tensor:
    """Repeat row m `lengths_M[m]` times, one after the other, N = `num_values` in all; backward sums them."""
    if torch.compiler.is_exporting():
        return rows_M.index_select(0, _row_of_value(lengths_M, num_values))
    expanded: Tensor = applied(_ExpandRows, rows_M, lengths_M, num_values)
    return expanded


def lengths_of(lengths_M: Lengths) -> Tensor:
    """Return the lengths as numbers, (M,)."""
    return lengths_M.lengths_M if isinstance(lengths_M, EvenLengths) else lengths_M


def segment_sum(rows_N: Tensor, lengths_M: Lengths) -> Tensor:
    """Sum the next `lengths_M[m]` rows for each m, (M, V); an empty segment is zero."""
    if isinstance(lengths_M, EvenLengths):
        return _planes(rows_N, lengths_M).sum(1)
    if torch.compiler.is_exporting():
        sums = rows_N.new_zeros(lengths_M.shape[0], *rows_N.shape[1:])
        return sums.index_add(0, _row_of_value(lengths_M, rows_N.shape[0]), rows_N)
    summed_MV: Tensor = applied(_SumSegments, rows_N, lengths_M)
    return summed_MV


def segment_max(rows_N: Tensor, lengths_M: Lengths) -> Tensor:
    """Take the maximum of the next `lengths_M[m]` rows for each m, by element, (M, V); an empty segment is zero.

    Equal rows share the gradient of their maximum.
    """
    if isinstance(lengths_M, EvenLengths):
        lowest_M1V = rows_N.new_full((lengths_M.rows, 1, *rows_N.shape[1:]), -torch.inf)
        return _zero_if_empty(torch.cat([_planes(rows_N, lengths_M), lowest_M1V], dim=1).amax(1))
    if torch.compiler.is_exporting():
        lowest_MV = rows_N.new_full((lengths_M.shape[0], *rows_N.shape[1:]), -torch.inf)
        row_N = _row_of_value(lengths_M, rows_N.shape[0])
        rows_of_values = row_N.view(-1, *[1] * (rows_N.dim() - 1)).expand_as(rows_N)
        return _zero_if_empty(lowest_MV.scatter_reduce(0, rows_of_values, rows_N, "amax"))
    if rows_N.shape[0] == 0:
        return segment_sum(rows_N, lengths_M)
    highest_MV: Tensor = applied(_SegmentMax, rows_N, lengths_M)
    return highest_MV


def segment_softmax(scores_N: Tensor, lengths_M: Tensor) -> Tensor:
    """Take the softmax of (N,) scores within each segment of the next `lengths_M[m]`."""
    num_values = scores_N.shape[0]
    if num_values == 0:
        return scores_N
    highest_M = _highest(scores_N.detach(), lengths_M)
    exponential_N = (scores_N - torch.repeat_interleave(highest_M, lengths_M, output_size=num_values)).exp()
    return exponential_N / expand_rows(segment_sum(exponential_N, lengths_M), lengths_M, num_values)


def _planes(rows_N: Tensor, lengths_M: EvenLengths) -> Tensor:
    return rows_N.view(lengths_M.rows, lengths_M.each, *rows_N.shape[1:])


def _row_of_value(lengths_M: Tensor, num_values: int) -> Tensor:
    """Return the row m that each value belongs to, (N,)."""
    places_N = torch.arange(num_values, device=lengths_M.device)
    return torch.searchsorted(lengths_M.cumsum(0), places_N, right=True)


def _zero_if_empty(highest_MV: Tensor) -> Tensor:
    return highest_MV.masked_fill(highest_MV == -torch.inf, 0.0)


def _highest(rows_N: Tensor, lengths_M: Tensor) -> Tensor:
    """Take the maximum of the next `lengths_M[m]` rows for each m; the lengths add up to N, which is not checked."""
    return torch.segment_reduce(rows_N, "max", lengths=lengths_M, axis=0, unsafe=True)


class _SumSegments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_N: Tensor, lengths_M: Tensor) -> Tensor:
        ctx.save_for_backward(lengths_M)
        ctx.num_values = rows_N.shape[0]
        return sum_in_order(rows_N, torch.arange(ctx.num_values, device=rows_N.device), lengths_M)

    @staticmethod
    def backward(ctx: Any, gradient_M: Tensor) -> tuple[Tensor, None]:
        (lengths_M,) = ctx.saved_tensors
        return torch.repeat_interleave(gradient_M, lengths_M, dim=0, output_size=ctx.num_values), None


class _ExpandRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_M: Tensor, lengths_M: Tensor, num_values: int) -> Tensor:
        ctx.save_for_backward(lengths_M)
        return torch.repeat_interleave(rows_M, lengths_M, dim=0, output_size=num_values)

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None, None]:
        (lengths_M,) = ctx.saved_tensors
        return segment_sum(gradient_N.contiguous(), lengths_M), None, None


class _SegmentMax(torch.autograd.Function):
    """Maximum of segments with a backward of its own: torch 2.13 gives equal rows a negative gradient whole, each."""

    @staticmethod
    def forward(ctx: Any, rows_N: Tensor, lengths_M: Tensor) -> Tensor:
        highest_MV = _highest(rows_N, lengths_M)
        ctx.save_for_backward(rows_N, highest_MV, lengths_M)
        return highest_MV.masked_fill(lengths_M.unsqueeze(1) == 0, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient_MV: Tensor) -> tuple[Tensor, None]:
        rows_N, highest_MV, lengths_M = ctx.saved_tensors
        highest_NV = torch.repeat_interleave(highest_MV, lengths_M, dim=0, output_size=len(rows_N))
        is_highest_N = (rows_N == highest_NV).to(rows_N.dtype)
        share_MV = gradient_MV / segment_sum(is_highest_N, lengths_M).clamp_min(1)
        return torch.repeat_interleave(share_MV, lengths_M, dim=0, output_size=len(rows_N)) * is_highest_N, None


def random_words(stream: str, number_N: Int64Array) -> UInt64Array:
    """Return the random 64 bits of these numbers in a stream, (N,), independent of earlier draws.

    They are splitmix64 of the stream's start plus the number.
    """
    counter_N = number_N.astype(np.uint64) + stream_start(stream)
    return splitmix64(counter_N.view(np.int64))
