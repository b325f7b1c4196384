"""Aggregators: the vectors of a user's behaviour images become one vector a sample.

Groups are jagged: a group's behaviours lie in memory once, however many samples look at them. Those that do not look at
the ad are here and are made once a group; attention.py and transformer.py beside it have those that do. All have a
`width`, and `forward(behaviors, group_of_sample_B, queries) -> (B, width)`; a group without behaviours gives zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.config.options import ModelConfig
from trainer.exchange.exchange import FieldVectors
from trainer.exchange.sums import take_rows
from trainer.models.hidden import HiddenLayers
from trainer.models.layers import lengths_of, segment_max, segment_sum, value_rows
from trainer.models.pooling.attention import AttentivePooling
from trainer.models.pooling.transformer import TransformerPooling


def sum_pool(field: FieldVectors) -> Tensor:
    """Sum each row's vectors, each times its weight, (M, V); a row without values is zero."""
    return segment_sum(value_rows(field), field.lengths_M)


def mean_pool(field: FieldVectors) -> Tensor:
    """Average each row's vectors, (M, V); a row without values is zero.

    With weights: the weighted sum over the sum of the absolute weights. So equal weights of any size give the plain
    mean, as in TensorFlow's combiner "mean", and weights that cancel out do not blow it up; a row whose weights are all
    zero is zero. (torch.nn.EmbeddingBag has weights for sums alone.)
    """
    summed_MV = sum_pool(field)
    if field.weights_N is None:
        lengths_M = lengths_of(field.lengths_M)
        return summed_MV / lengths_M.clamp_min(1).to(summed_MV.dtype).unsqueeze(1)
    total_M = segment_sum(field.weights_N.abs(), field.lengths_M)
    return summed_MV / total_M.masked_fill(total_M == 0, 1).unsqueeze(1)


class GroupPooling(nn.Module):
    """Pooling that does not look at the ad: made once for each group, and handed to the group's samples."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def per_group(self, behaviors: FieldVectors) -> Tensor:
        """Return one vector for each group, (G, width)."""
        raise NotImplementedError

    def forward(self, behaviors: FieldVectors, group_of_sample_B: Tensor, queries: Sequence[Tensor] = ()) -> Tensor:
        """Return the vector of each sample's group, (B, width); `queries` are not used."""
        return take_rows(self.per_group(behaviors), group_of_sample_B)


class SumPooling(GroupPooling):
    """Sum over k of v_k."""

    def per_group(self, behaviors: FieldVectors) -> Tensor:
        return sum_pool(behaviors)


class MeanPooling(GroupPooling):
    """(1 / n) sum over k of v_k, n the group's own number of behaviours."""

    def per_group(self, behaviors: FieldVectors) -> Tensor:
        return mean_pool(behaviors)


class MaxPooling(GroupPooling):
    """max over k of v_k, element by element. Behaviours that share the maximum share its gradient."""

    def per_group(self, behaviors: FieldVectors) -> Tensor:
        return segment_max(take_rows(behaviors.vectors_UV, behaviors.index_N), behaviors.lengths_M)


class ConcatPooling(GroupPooling):
    """[v_1, v_2, .., v_L]: the first L behaviours, which are the newest; zeros where there are fewer."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__(width * length)
        self.length = length

    def per_group(self, behaviors: FieldVectors) -> Tensor:
        lengths_G = lengths_of(behaviors.lengths_M)
        num_groups = lengths_G.shape[0]
        if torch.compiler.is_exporting():
            return self._by_place(behaviors, lengths_G).view(num_groups, self.width)
        kept_G = lengths_G.clamp_max(self.length)
        num_kept = None if behaviors.on_host is None else behaviors.on_host.num_values(self.length)
        groups_G = torch.arange(num_groups, device=kept_G.device)
        group_K = torch.repeat_interleave(groups_G, kept_G, output_size=num_kept)
        place_K = torch.arange(len(group_K), device=kept_G.device) - (kept_G.cumsum(0) - kept_G)[group_K]
        value_K = (lengths_G.cumsum(0) - lengths_G)[group_K] + place_K
        rows_KV = take_rows(behaviors.vectors_UV, behaviors.index_N.index_select(0, value_K))
        padded = rows_KV.new_zeros(num_groups * self.length, rows_KV.shape[1])
        return padded.index_copy(0, group_K * self.length + place_K, rows_KV).view(num_groups, self.width)

    def _by_place(self, behaviors: FieldVectors, lengths_G: Tensor) -> Tensor:
        """Look up what each place of each group holds, (G, L, V), so that no size depends on what the lengths are."""
        place_L = torch.arange(self.length, device=lengths_G.device)
        is_there_GL = place_L < lengths_G.unsqueeze(1)
        next_GL = (lengths_G.cumsum(0) - lengths_G).unsqueeze(1) + place_L + 1
        rows_NV = take_rows(behaviors.vectors_UV, behaviors.index_N)
        rows_behind_zero = torch.cat([rows_NV.new_zeros(1, rows_NV.shape[1]), rows_NV])
        return rows_behind_zero.index_select(0, next_GL.masked_fill(~is_there_GL, 0).flatten())


def build_aggregator(
    width: int, query_widths: Sequence[int], config: ModelConfig, layers: HiddenLayers
) -> GroupPooling | AttentivePooling | TransformerPooling:
    """Make the aggregator of `config.pooling` over vectors of `width`; `query_widths`: of what it asks with, if any."""
    match config.pooling:
        case "concat":
            return ConcatPooling(width, config.concat_length)
        case "max":
            return MaxPooling(width)
        case "sum":
            return SumPooling(width)
        case "mean":
            return MeanPooling(width)
        case "attentive" | "multi_query":
            return AttentivePooling(width, query_widths, config.attention_hidden, layers)
        case "transformer":
            return TransformerPooling(
                width,
                query_widths,
                hidden=config.transformer_width,
                num_heads=config.transformer_heads,
                num_layers=config.transformer_layers,
                length=config.transformer_length,
            )
