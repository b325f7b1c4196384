"""Attention over a user's behaviours: each is weighed by what it has to do with the ad of the sample.

All (sample, behaviour) pairs lie one after the other, N' of them here written N, without padding; their keys are read
through an index, so a group's vectors are kept once, however many samples look at them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from trainer.exchange.exchange import EvenLengths, FieldVectors
from trainer.exchange.sums import take_rows
from trainer.models.hidden import HiddenLayers
from trainer.models.layers import expand_rows, lengths_of, segment_softmax, segment_sum, value_rows


@dataclass(frozen=True)
class PairWeights:
    """How much each behaviour of a sample counts: all (sample, behaviour) pairs by sample, as `pairs` lists them."""

    weight_NC: Tensor
    """One column a channel; those of a sample sum to 1 in each."""
    lengths_B: Tensor
    """Behaviours of each sample that are weighed, its newest ones."""


class ActivationUnit(nn.Module):
    """DIN's unit that scores a key against a query: v . f(K k + Q q + C (k * m) + b), m as wide as the key.

    It is one hidden layer on both vectors and their product (Zhou et al., KDD 2018, figure 2), the layer written as a
    sum, so that what needs only the query is made once a sample; f is `model.activation`. A difference q - k as further
    input would add nothing: it is linear in what is there. m is M q where the two differ in width or in meaning
    (`match`), else q.
    """

    def __init__(
        self, key_width: int, query_width: int, hidden: int, layers: HiddenLayers, *, match: bool, bias: bool
    ) -> None:
        super().__init__()
        assert match or key_width == query_width
        self.of_key = nn.Linear(key_width, hidden, bias=False)
        self.of_query = nn.Linear(query_width, hidden)
        self.match = nn.Linear(query_width, key_width, bias=False) if match else nn.Identity()
        self.of_product = nn.Linear(key_width, hidden, bias=False)
        self.activation = layers.activation(hidden)
        self.score = nn.Linear(hidden, 1, bias=bias)

    def forward(self, key_NV: Tensor, query_BW: Tensor, lengths_B: Tensor) -> Tensor:
        """Return scores (N,); the next `lengths_B[b]` keys belong to query b."""
        num_keys = key_NV.shape[0]
        hidden_NH = expand_rows(self.of_query(query_BW), lengths_B, num_keys)
        hidden_NH = torch.addmm(hidden_NH, key_NV, self.of_key.weight.T)
        matched_NV = key_NV * expand_rows(self.match(query_BW), lengths_B, num_keys)
        hidden_NH = self.activation(torch.addmm(hidden_NH, matched_NV, self.of_product.weight.T))
        score_N1: Tensor = self.score(hidden_NH)
        return score_N1.squeeze(1)

    def of_all(self, key_LV: Tensor, query_BW: Tensor) -> Tensor:
        """Return what `forward` does where all queries have the same keys, (L, B).

        C (k * m) is (C m) k, so no pair's key is laid out, and one product makes the hidden units of all pairs.
        """
        num_queries, hidden = query_BW.shape[0], self.score.in_features
        matched_VB1 = self.match(query_BW).T.unsqueeze(2)
        weights_VBH = self.of_product.weight.T.unsqueeze(1) * matched_VB1 + self.of_key.weight.T.unsqueeze(1)
        product_LBH = (key_LV @ weights_VBH.flatten(1)).view(-1, num_queries, hidden)
        hidden_NH = self.activation((product_LBH + self.of_query(query_BW)).view(-1, hidden))
        score_N: Tensor = (hidden_NH * self.score.weight).sum(1)
        if self.score.bias is not None:
            score_N = score_N + self.score.bias
        return score_N.view(-1, num_queries)


class AttentivePooling(nn.Module):
    """Weighted sums of a group's behaviour vectors, one for each query: sum over k of softmax_k(unit(k, q)) k.

    One query is the paper's AttentivePooling. Two, the ad's visual vector and the ad's ID vectors, are its
    MultiQueryAttentivePooling: every channel has an activation unit of its own and makes its own weights; the weighted
    sums are concatenated. A group without behaviours gives zero.
    """

    def __init__(self, width: int, query_widths: Sequence[int], hidden: int, layers: HiddenLayers) -> None:
        super().__init__()
        self.width = width * len(query_widths)
        self.channels = nn.ModuleList(
            ActivationUnit(width, query_width, hidden, layers, match=True, bias=False) for query_width in query_widths
        )

    def forward(self, behaviors: FieldVectors, group_of_sample_B: Tensor, queries: Sequence[Tensor]) -> Tensor:
        """Return the pooled vectors (B, width) for one query (B, W) of each channel."""
        if isinstance(behaviors.lengths_M, EvenLengths):
            key_LV = value_rows(behaviors)
            units = zip(self.channels, queries, strict=True)
            scores = [cast(ActivationUnit, unit).of_all(key_LV, query_BW) for unit, query_BW in units]
            return torch.cat([score_LB.softmax(0).T @ key_LV for score_LB in scores], dim=1)
        key_NV, lengths_B = _keys(behaviors, group_of_sample_B)
        weights = self._weights(key_NV, lengths_B, queries)
        return torch.cat([segment_sum(key_NV * weight_N.unsqueeze(1), lengths_B) for weight_N in weights], dim=1)

    def weights(self, behaviors: FieldVectors, group_of_sample_B: Tensor, queries: Sequence[Tensor]) -> PairWeights:
        """Return what `forward` multiplies the behaviours' vectors by, a channel for each query."""
        key_NV, lengths_B = _keys(behaviors, group_of_sample_B)
        return PairWeights(torch.stack([*self._weights(key_NV, lengths_B, queries)], dim=1), lengths_B)

    def _weights(self, key_NV: Tensor, lengths_B: Tensor, queries: Sequence[Tensor]) -> Iterator[Tensor]:
        for unit, query_BW in zip(self.channels, queries, strict=True):
            yield segment_softmax(unit(key_NV, query_BW, lengths_B), lengths_B)


class BehaviorAttention(nn.Module):
    """DIN's attention over behaviour IDs by the ad's: sum over k of unit(k, q) k, the weights not normalised.

    Key k is the concatenation of the vectors of behaviour k (its item, category, image id), the query that of the ad's
    in the same tables. Without softmax the size of the sum says how much of the history has to do with the ad, as in
    Zhou et al., KDD 2018, section 4.3. What only a behaviour has (its age) makes keys wider than the query, which a
    linear layer then brings to their width for the product.
    """

    def __init__(self, width: int, query_width: int, hidden: int, layers: HiddenLayers) -> None:
        """`width`: of the keys."""
        super().__init__()
        self.width = width
        self.unit = ActivationUnit(width, query_width, hidden, layers, match=width != query_width, bias=True)

    def forward(self, behaviors: Sequence[FieldVectors], group_of_sample_B: Tensor, query_BW: Tensor) -> Tensor:
        """Return the pooled vectors, (B, width).

        The fields' values belong together by position, so their lengths are equal.
        """
        if isinstance(behaviors[0].lengths_M, EvenLengths):
            key_LW = torch.cat([value_rows(field) for field in behaviors], dim=1)
            return self.unit.of_all(key_LW, query_BW).T @ key_LW
        position_N, lengths_B = pairs(behaviors[0], group_of_sample_B)
        key_NW = torch.cat([value_rows(field, position_N) for field in behaviors], dim=1)
        weight_N = self.unit(key_NW, query_BW, lengths_B)
        return segment_sum(key_NW * weight_N.unsqueeze(1), lengths_B)


def _keys(behaviors: FieldVectors, group_of_sample_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the vector of each pair's behaviour (N, V), and pairs a sample."""
    position_N, lengths_B = pairs(behaviors, group_of_sample_B)
    return take_rows(behaviors.vectors_UV, behaviors.index_N.index_select(0, position_N)), lengths_B


def pairs(behaviors: FieldVectors, group_of_sample_B: Tensor, at_most: int | None = None) -> tuple[Tensor, Tensor]:
    """Return all (sample, behaviour) pairs by sample: each one's place in the field's values, and pairs a sample.

    `at_most`: behaviours taken of a group, the first ones, which are the newest.
    """
    lengths_G = lengths_of(behaviors.lengths_M)
    lengths_B = lengths_G.index_select(0, group_of_sample_B)
    if at_most is not None:
        lengths_B = lengths_B.clamp_max(at_most)
    start_G = lengths_G.cumsum(0) - lengths_G
    # Pair n of a sample is behaviour (start of its group) + (n - start of the sample's pairs).
    shift_B = start_G.index_select(0, group_of_sample_B) - (lengths_B.cumsum(0) - lengths_B)
    num_pairs = None if behaviors.on_host is None else behaviors.on_host.num_pairs(at_most)
    shift_N = torch.repeat_interleave(shift_B, lengths_B, output_size=num_pairs)
    return shift_N + torch.arange(shift_N.shape[0], device=shift_N.device), lengths_B
