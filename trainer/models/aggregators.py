"""Aggregators: the vectors of a user's behaviour images become one vector a sample.

Groups are jagged: a group's behaviours lie in memory once, however many samples look at them.
"""

import torch
from torch import Tensor, nn

from trainer.exchange import FieldVectors
from trainer.models.layers import expand_rows, segment_softmax, segment_sum, take_rows


def sum_pool(field: FieldVectors) -> Tensor:
    """Sum of each row's vectors, (M, V); a row without values is zero."""
    return segment_sum(take_rows(field.vectors_UV, field.index_N), field.lengths_M)


class SumPooling(nn.Module):
    """Sum of a group's behaviour vectors: the ad is not looked at, so it is made once per group."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, behaviors: FieldVectors, group_of_sample_B: Tensor, query_BW: Tensor | None) -> Tensor:
        """(B, V); `query_BW` is not used."""
        return take_rows(sum_pool(behaviors), group_of_sample_B)


class AttentivePooling(nn.Module):
    """Weighted sum of a group's behaviour vectors, weighted by softmax over what each has to do with the ad.

    The score of behaviour vector k for query q is v . PReLU(K k + Q q + C (k * M q)): the activation unit of DIN on
    both and their product, its first layer written as a sum, so that what needs only the query is made once a sample.
    A group without behaviours gives zero.
    """

    def __init__(self, width: int, query_width: int, hidden: int) -> None:
        super().__init__()
        self.width = width
        self.of_key = nn.Linear(width, hidden)
        self.of_query = nn.Linear(query_width, hidden, bias=False)
        self.match = nn.Linear(query_width, width, bias=False)
        self.of_product = nn.Linear(width, hidden, bias=False)
        self.activation = nn.PReLU()
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, behaviors: FieldVectors, group_of_sample_B: Tensor, query_BW: Tensor | None) -> Tensor:
        """(B, V) for queries (B, W)."""
        assert query_BW is not None
        pair_index_N, lengths_B = _pairs(behaviors, group_of_sample_B)
        key_NV = take_rows(behaviors.vectors_UV, pair_index_N)
        of_sample_B = torch.cat([self.of_query(query_BW), self.match(query_BW)], dim=1)
        of_sample_N = expand_rows(of_sample_B, lengths_B)
        of_query_NH, match_NV = of_sample_N[:, : -self.width], of_sample_N[:, -self.width :]
        hidden_NH = self.activation(self.of_key(key_NV) + of_query_NH + self.of_product(key_NV * match_NV))
        weight_N = segment_softmax(self.score(hidden_NH).squeeze(1), lengths_B)
        return segment_sum(key_NV * weight_N.unsqueeze(1), lengths_B)


def _pairs(behaviors: FieldVectors, group_of_sample_B: Tensor) -> tuple[Tensor, Tensor]:
    """All (sample, behaviour) pairs, sample by sample: the behaviour's row in vectors_UV, and pairs of each sample."""
    lengths_B = behaviors.lengths_M.index_select(0, group_of_sample_B)
    group_start_G = behaviors.lengths_M.cumsum(0) - behaviors.lengths_M
    # Pair n of a sample is behaviour (start of its group) + (n - start of the sample's pairs).
    shift_B = group_start_G.index_select(0, group_of_sample_B) - (lengths_B.cumsum(0) - lengths_B)
    shift_N = torch.repeat_interleave(shift_B, lengths_B)
    return behaviors.index_N[shift_N + torch.arange(len(shift_N), device=shift_N.device)], lengths_B
