"""Building blocks of the networks. Jagged sums go by lengths, never by atomic adds: the same bits in every run.

`torch.segment_reduce` over sorted rows took a fifth of the time of `index_add_` on 99,000 rows of 12 (CPU, 2 cores).
Under torch.export, which has no compiled form of it, what has uneven lengths goes by the row of each value instead.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.exchange.exchange import EvenLengths, FieldVectors, Lengths
from trainer.exchange.sums import reduce_segments, take_rows
from trainer.models.hidden import HiddenLayers


class Mlp(nn.Sequential):
    """Fully connected layers with what `hidden` makes between them; the last one is linear, or `activated` too."""

    def __init__(self, widths: Sequence[int], hidden: HiddenLayers, *, activated: bool = False) -> None:
        super().__init__()
        for layer, (inner, outer) in enumerate(itertools.pairwise(widths)):
            self.add_module(str(2 * layer), nn.Linear(inner, outer))
            if activated or layer < len(widths) - 2:
                for name, module in hidden.after(layer, outer):
                    self.add_module(name, module)


def value_rows(field: FieldVectors, at_N: Tensor | None = None) -> Tensor:
    """Return the vector of each value of a field, or of those at these places, times its weight, (N, V)."""
    index_N, weights_N = field.index_N, field.weights_N
    if at_N is not None:
        index_N = index_N.index_select(0, at_N)
        weights_N = None if weights_N is None else weights_N.index_select(0, at_N)
    rows_NV = take_rows(field.vectors_UV, index_N)
    return rows_NV if weights_N is None else rows_NV * weights_N.unsqueeze(1)


def chosen_values(field: FieldVectors, at_N: Tensor, lengths_M: Lengths) -> FieldVectors:
    """Return a field whose row m has the next `lengths_M[m]` of the values at these places."""
    return FieldVectors(field.vectors_UV, field.index_N.index_select(0, at_N), lengths_M)


def expand_rows(rows_M: Tensor, lengths_M: Tensor, num_values: int) -> Tensor:
    """Repeat row m `lengths_M[m]` times, one after the other, N = `num_values` in all; backward sums them."""
    if torch.compiler.is_exporting():
        return rows_M.index_select(0, _row_of_value(lengths_M, num_values))
    expanded: Tensor = _ExpandRows.apply(rows_M, lengths_M, num_values)  # type: ignore[no-untyped-call]
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
    if rows_N.shape[0] == 0:  # segment_reduce has no gradient for no data; an empty sum keeps the graph connected
        return rows_N.sum(0) + rows_N.new_zeros(len(lengths_M), *rows_N.shape[1:])
    return reduce_segments(rows_N, "sum", lengths_M)


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
    highest_MV: Tensor = _SegmentMax.apply(rows_N, lengths_M)  # type: ignore[no-untyped-call]
    return highest_MV


def segment_softmax(scores_N: Tensor, lengths_M: Tensor) -> Tensor:
    """Take the softmax of (N,) scores within each segment of the next `lengths_M[m]`."""
    num_values = scores_N.shape[0]
    if torch.compiler.is_exporting():
        exponential_N = (scores_N - expand_rows(segment_max(scores_N, lengths_M), lengths_M, num_values)).exp()
    else:
        if num_values == 0:
            return scores_N
        highest_M = reduce_segments(scores_N.detach(), "max", lengths_M)
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
    """With a backward of its own: segment_reduce of torch 2.13 gives equal rows a negative gradient whole, each."""

    @staticmethod
    def forward(ctx: Any, rows_N: Tensor, lengths_M: Tensor) -> Tensor:
        highest_MV = reduce_segments(rows_N, "max", lengths_M)
        ctx.save_for_backward(rows_N, highest_MV, lengths_M)
        return highest_MV.masked_fill(lengths_M.unsqueeze(1) == 0, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient_MV: Tensor) -> tuple[Tensor, None]:
        rows_N, highest_MV, lengths_M = ctx.saved_tensors
        highest_NV = torch.repeat_interleave(highest_MV, lengths_M, dim=0, output_size=len(rows_N))
        is_highest_N = (rows_N == highest_NV).to(rows_N.dtype)
        share_MV = gradient_MV / segment_sum(is_highest_N, lengths_M).clamp_min(1)
        return torch.repeat_interleave(share_MV, lengths_M, dim=0, output_size=len(rows_N)) * is_highest_N, None
