"""Pooling of behaviours: averages, maxima and attention.

A group's behaviours lie in memory once, however many samples look at them: all (sample, behaviour) pairs lie one after
the other, without padding, and their vectors are read through an index. Aggregators that do not look at the ad are made
once a group. `AGGREGATORS` has the class of each model.pooling.

Letters here: N pairs, L places of behaviours, H hidden width. Other letters as in trainer/samples/reader.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from trainer.config import ModelConfig, Pooling
from trainer.errors import ConfigError
from trainer.exchange.vectors import EvenLengths, FieldVectors, pool_rows, take_rows
from trainer.models import layers as parts
from trainer.models.layers import HiddenLayers, expand_rows, lengths_of, segment_max, segment_sum, value_rows
from trainer.problems import Problem


@dataclass(frozen=True)
class PairWeights:
    """Weight of each behaviour of a sample: all (sample, behaviour) pairs by sample, as `pairs` lists them."""

    weight_NC: Tensor
    """One column a channel; those of a sample sum to 1 in each."""
    lengths_B: Tensor
    """Behaviours of each sample."""


Asks = Literal["nothing", "images", "images and ids"]


class Aggregator(nn.Module):
    """Base of the aggregators: the vectors of a group's behaviours become one for each sample, (B, width)."""

    asks: ClassVar[Asks] = "nothing"
    """Parts of the ad that it queries with, a query each. images: its visual vectors, or its IDs where it has none;
    images and ids: both."""
    weighing: ClassVar[str]
    """Sentence that the explorer shows on how it weighs behaviours."""

    def __init__(self, width: int, query_widths: Sequence[int], config: ModelConfig, layers: HiddenLayers) -> None:
        """`width`: of the behaviours' vectors; `query_widths`: of its queries, if any."""
        super().__init__()
        self.width = width

    def forward(self, behaviors: FieldVectors, group_of_sample_B: Tensor, queries: Sequence[Tensor]) -> Tensor:
        """Return the pooled vectors (B, width) for the ad's vectors (B, W) each; zero without behaviours."""
        raise NotImplementedError

    def weights(
        self, behaviors: FieldVectors, group_of_sample_B: Tensor, queries: Sequence[Tensor]
    ) -> PairWeights | None:
        """Return how much each behaviour counts; None where behaviours have no weights."""
        return None


def queries_of(pooling: Pooling, width_of_ad: Mapping[str, int]) -> tuple[str, ...]:
    """Return the aggregators' queries: the ad's `images`, its `ids`, both or neither; `width_of_ad` of each.

    Raises ConfigError where one is missing.
    """
    wanted = AGGREGATORS[pooling].asks
    if wanted == "nothing":
        return ()
    has = tuple(name for name, width in width_of_ad.items() if width)
    if not has:
        raise ConfigError(Problem.NO_FIELD_TO_QUERY, pooling)
    if wanted == "images and ids" and "ids" not in has:
        raise ConfigError(Problem.NO_IDS_TO_QUERY, pooling)
    return has[:1] if wanted == "images" else has


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
        self.activation = layers.activation()
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
        """Return the result of `forward` where all queries have the same keys, (L, B).

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


class AttentivePooling(Aggregator):
    """Weighted sums of a group's behaviour vectors, one for each query: sum over k of softmax_k(unit(k, q)) k.

    Every query has a channel, with an activation unit and weights of its own; the weighted sums are concatenated. A
    group without behaviours gives zero.
    """

    asks: ClassVar[Asks] = "images"
    weighing = "The aggregator is attentive: the weights of a history sum to 100 %."

    def __init__(self, width: int, query_widths: Sequence[int], config: ModelConfig, layers: HiddenLayers) -> None:
        super().__init__(width * len(query_widths), query_widths, config, layers)
        self.channels = nn.ModuleList(
            ActivationUnit(width, query_width, config.attention_hidden, layers, match=True, bias=False)
            for query_width in query_widths
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
        """Return the weights of the behaviours' vectors in `forward`, a channel for each query."""
        key_NV, lengths_B = _keys(behaviors, group_of_sample_B)
        return PairWeights(torch.stack([*self._weights(key_NV, lengths_B, queries)], dim=1), lengths_B)

    def _weights(self, key_NV: Tensor, lengths_B: Tensor, queries: Sequence[Tensor]) -> Iterator[Tensor]:
        for unit, query_BW in zip(self.channels, queries, strict=True):
            yield parts.segment_softmax(unit(key_NV, query_BW, lengths_B), lengths_B)


class MultiQueryPooling(AttentivePooling):
    """The paper's MultiQueryAttentivePooling: one query is the ad's visual vectors, the other one its ID vectors."""

    asks = "images and ids"
    weighing = (
        "The aggregator asks twice, with the ad's picture and with its IDs: each makes weights of its own, which sum "
        "to 100 %."
    )


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


def pairs(behaviors: FieldVectors, group_of_sample_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return all (sample, behaviour) pairs by sample: each one's place in the field's values, and pairs a sample."""
    lengths_G = lengths_of(behaviors.lengths_M)
    lengths_B = lengths_G.index_select(0, group_of_sample_B)
    start_G = lengths_G.cumsum(0) - lengths_G
    # Pair n of a sample is behaviour (start of its group) + (n - start of the sample's pairs).
    shift_B = start_G.index_select(0, group_of_sample_B) - (lengths_B.cumsum(0) - lengths_B)
    num_pairs = None if behaviors.on_host is None else behaviors.on_host.num_pairs()
    shift_N = torch.repeat_interleave(shift_B, lengths_B, output_size=num_pairs)
    return shift_N + torch.arange(shift_N.shape[0], device=shift_N.device), lengths_B


def sum_pool(field: FieldVectors) -> Tensor:
    """Sum each row's vectors, each times its weight, (M, V); a row without values is zero."""
    lengths_M = field.lengths_M
    if field.weights_N is None and not isinstance(lengths_M, EvenLengths) and not torch.compiler.is_exporting():
        return pool_rows(field.vectors_UV, field.index_N, lengths_M)
    return segment_sum(value_rows(field), lengths_M)


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


class GroupPooling(Aggregator):
    """Pooling that does not look at the ad: made once for each group, and handed to the group's samples."""

    def per_group(self, behaviors: FieldVectors) -> Tensor:
        """Return one vector for each group, (G, width)."""
        raise NotImplementedError

    def forward(self, behaviors: FieldVectors, group_of_sample_B: Tensor, queries: Sequence[Tensor] = ()) -> Tensor:
        """Return the vector of each sample's group, (B, width); `queries` are not used."""
        return take_rows(self.per_group(behaviors), group_of_sample_B)


class SumPooling(GroupPooling):
    """Sum over k of v_k."""

    weighing = "The aggregator is a plain sum, so no behaviour has a weight: its effect on the score is shown."

    def per_group(self, behaviors: FieldVectors) -> Tensor:
        return sum_pool(behaviors)


class MeanPooling(GroupPooling):
    """(1 / n) sum over k of v_k, n the group's own number of behaviours."""

    weighing = "The aggregator is a plain mean, so all behaviours weigh the same: their effects on the score are shown."

    def per_group(self, behaviors: FieldVectors) -> Tensor:
        return mean_pool(behaviors)


class MaxPooling(GroupPooling):
    """max over k of v_k, element by element. Behaviours that share the maximum share its gradient."""

    weighing = "The aggregator takes maxima, so no behaviour has a weight: its effect on the score is shown."

    def per_group(self, behaviors: FieldVectors) -> Tensor:
        return segment_max(take_rows(behaviors.vectors_UV, behaviors.index_N), behaviors.lengths_M)


class ConcatPooling(GroupPooling):
    """[v_1, v_2, .., v_L]: the first L behaviours, which are the newest; zeros where there are fewer."""

    weighing = (
        "The aggregator puts the newest behaviours side by side, so none has a weight: its effect on the score is "
        "shown."
    )

    def __init__(self, width: int, query_widths: Sequence[int], config: ModelConfig, layers: HiddenLayers) -> None:
        super().__init__(width * config.pooling_length, query_widths, config, layers)
        self.length = config.pooling_length

    def per_group(self, behaviors: FieldVectors) -> Tensor:
        lengths_G = behaviors.lengths_M
        if isinstance(lengths_G, EvenLengths):  # of one user
            rows_LV = take_rows(behaviors.vectors_UV, behaviors.index_N)
            padded = torch.cat([rows_LV, rows_LV.new_zeros(self.length, rows_LV.shape[1])])
            return padded[: self.length].reshape(1, self.width)
        num_groups = lengths_G.shape[0]
        kept_G = lengths_G.clamp_max(self.length)
        num_kept = None if behaviors.on_host is None else behaviors.on_host.num_values(self.length)
        groups_G = torch.arange(num_groups, device=kept_G.device)
        group_K = torch.repeat_interleave(groups_G, kept_G, output_size=num_kept)
        place_K = torch.arange(len(group_K), device=kept_G.device) - (kept_G.cumsum(0) - kept_G)[group_K]
        value_K = (lengths_G.cumsum(0) - lengths_G)[group_K] + place_K
        rows_KV = take_rows(behaviors.vectors_UV, behaviors.index_N.index_select(0, value_K))
        padded = rows_KV.new_zeros(num_groups * self.length, rows_KV.shape[1])
        return padded.index_copy(0, group_K * self.length + place_K, rows_KV).view(num_groups, self.width)


AGGREGATORS: Mapping[Pooling, type[Aggregator]] = {
    "concat": ConcatPooling,
    "max": MaxPooling,
    "sum": SumPooling,
    "mean": MeanPooling,
    "attentive": AttentivePooling,
    "multi_query": MultiQueryPooling,
}
