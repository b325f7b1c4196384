"""Pooling of behaviours: averages, attention and transformers.

All (sample, behaviour) pairs lie one after the other, N' of them here written N, without padding; their keys are read
through an index, so a group's vectors are kept once, however many samples look at them.

K ads or behaviours, N images of all of them; other letters as in trainer/samples/reader.py.

Letters here: N tokens, which are (sample, behaviour) pairs one after the other without padding, L places of behaviours,
H hidden width.

Groups are jagged: a group's behaviours lie in memory once, however many samples look at them. Those that do not look at
the ad are made once a group. `AGGREGATORS` has the class of each model.pooling.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config.options import ModelConfig, Pooling
from trainer.errors import ConfigError
from trainer.exchange.vectors import EvenLengths, FieldVectors, Lengths, pool_rows, take_rows
from trainer.models.layers import (
    HiddenLayers,
    expand_rows,
    lengths_of,
    segment_max,
    segment_softmax,
    segment_sum,
    value_rows,
)
from trainer.schema.fields import GalleryPooling


@dataclass(frozen=True)
class PairWeights:
    """How much each behaviour of a sample counts: all (sample, behaviour) pairs by sample, as `pairs` lists them."""

    weight_NC: Tensor
    """One column a channel; those of a sample sum to 1 in each."""
    lengths_B: Tensor
    """Behaviours of each sample that are weighed, its newest ones."""


Asks = Literal["nothing", "images", "images and ids", "anything"]


class Aggregator(nn.Module):
    """Base of the aggregators: the vectors of a group's behaviours become one for each sample, (B, width)."""

    asks: ClassVar[Asks] = "nothing"
    """What of the ad it asks with, a query each. images: its visual vectors, or its IDs where it has none; images and
    ids: both of them; anything: what there is of the two."""
    weighing: ClassVar[str]
    """How it weighs behaviours, in a sentence that the explorer shows."""

    def __init__(self, width: int, query_widths: Sequence[int], config: ModelConfig, layers: HiddenLayers) -> None:
        """`width`: of the behaviours' vectors; `query_widths`: of what it asks with, if anything."""
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
    """Return what the aggregators ask with: the ad's `images`, its `ids`, both or neither; `width_of_ad` of each.

    Raises ConfigError where there is not what they need.
    """
    wanted = AGGREGATORS[pooling].asks
    if wanted == "nothing":
        return ()
    has = tuple(name for name, width in width_of_ad.items() if width)
    if not has:
        raise ConfigError(f"model.pooling={pooling} needs a field on side ad to ask with; set model.pooling=sum")
    if wanted == "images and ids" and "ids" not in has:
        raise ConfigError(
            f"model.pooling={pooling} asks with the ad's IDs too, and the schema has none on side ad; "
            "add one, or set model.pooling=attentive"
        )
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
        """Return what `forward` multiplies the behaviours' vectors by, a channel for each query."""
        key_NV, lengths_B = _keys(behaviors, group_of_sample_B)
        return PairWeights(torch.stack([*self._weights(key_NV, lengths_B, queries)], dim=1), lengths_B)

    def _weights(self, key_NV: Tensor, lengths_B: Tensor, queries: Sequence[Tensor]) -> Iterator[Tensor]:
        for unit, query_BW in zip(self.channels, queries, strict=True):
            yield segment_softmax(unit(key_NV, query_BW, lengths_B), lengths_B)


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


def gallery_vectors(images: FieldVectors, sizes_K: Tensor, lengths_M: Lengths, pooling: GalleryPooling) -> FieldVectors:
    """Make one vector for each ad or behaviour, which the model takes as that of one image.

    `sizes_K`, `lengths_M`: the gallery of `Batch.galleries`. An image that is twice in a gallery counts twice in its
    mean. A gallery without images is a vector of zeros, whatever data.missing says: there is no key that could lack a
    feature.
    """
    per_item = FieldVectors(images.vectors_UV, images.index_N, sizes_K)
    if pooling == "mean":
        vectors_KV = mean_pool(per_item)
    else:
        vectors_KV = segment_max(take_rows(per_item.vectors_UV, per_item.index_N), sizes_K)
    return FieldVectors(vectors_KV, torch.arange(sizes_K.shape[0], device=sizes_K.device), lengths_M)


_POSITION_SCALE = 0.02


@dataclass(frozen=True)
class TokenPlaces:
    """Places of tokens in the padded (B, L) of their samples."""

    place_N: Tensor
    """Of the token in its sample; 0: the newest behaviour."""
    cell_N: Tensor
    """sample x L + place."""
    is_token_BL: Tensor


class TransformerPooling(Aggregator):
    """Early fusion of the ad with each behaviour, an encoder layer, then [the maximum, the newest], (B, 2 H).

    As in TransAct (Xia et al., KDD 2023, section 3.2), token k is [v_k, q] through a linear layer, v_k the visual
    vector of behaviour k and q the ad's vectors, plus a vector of the place k. The output is the maximum over the
    tokens, element by element, beside the token of the newest behaviour. A group without behaviours gives zero. No
    dropout: its random numbers would depend on the number of ranks.

    Cost: the ad is part of every token, so all of it is computed once a sample, not once a group. For each sample of n
    behaviours that is about 16 n H^2 operations, and 4 H L^2 in attention, which alone is padded; backward takes twice
    that. With the preset's sizes and 16 behaviours: 0.4 million a sample forward. Forward and backward of 1,024 samples
    with 17 behaviours each took 62 ms of one processor core; attentive pooling took 8. A second layer gained nothing
    (docs/RESULTS.md).
    """

    asks = "anything"
    weighing = (
        "The aggregator is a transformer: the weights are how much the behaviours look at each one, on average; they "
        "sum to 100 %, and nothing is multiplied by them alone."
    )

    def __init__(self, width: int, query_widths: Sequence[int], config: ModelConfig, layers: HiddenLayers) -> None:
        """The newest `model.pooling_length` behaviours are looked at."""
        hidden, length = config.transformer_width, config.pooling_length
        super().__init__(2 * hidden, query_widths, config, layers)
        self.length = length
        # The linear layer on [v_k, q] is a sum: of behaviours once a unique image, of ads once a sample.
        self.of_behavior = nn.Linear(width, hidden, bias=False)
        self.of_ad = nn.Linear(sum(query_widths), hidden)
        self.position_LH = nn.Parameter(_POSITION_SCALE * torch.randn(length, hidden))
        self.encoder = EncoderLayer(hidden)

    def forward(self, behaviors: FieldVectors, group_of_sample_B: Tensor, queries: Sequence[Tensor]) -> Tensor:
        """Return the pooled vectors (B, width) for the ad's vectors (B, W) each."""
        token_NH, places, lengths_B = self._tokens(behaviors, group_of_sample_B, queries)
        token_NH = self.encoder(token_NH, places)
        newest_BH = segment_sum(token_NH.masked_fill(places.place_N.unsqueeze(1) > 0, 0.0), lengths_B)
        return torch.cat([segment_max(token_NH, lengths_B), newest_BH], dim=1)

    def weights(self, behaviors: FieldVectors, group_of_sample_B: Tensor, queries: Sequence[Tensor]) -> PairWeights:
        """Return the mean attention of a sample's tokens to each behaviour, (N, 1).

        It is the mean over its heads and over the tokens that look. Unlike the weights of `AttentivePooling` nothing is
        multiplied by it.
        """
        token_NH, places, lengths_B = self._tokens(behaviors, group_of_sample_B, queries)
        return PairWeights(self.encoder.attention.looked_at(token_NH, places).unsqueeze(1), lengths_B)

    def _tokens(
        self, behaviors: FieldVectors, group_of_sample_B: Tensor, queries: Sequence[Tensor]
    ) -> tuple[Tensor, TokenPlaces, Tensor]:
        """Return the tokens before the encoder (N, H), their places, and tokens a sample."""
        value_N, lengths_B = pairs(behaviors, group_of_sample_B, self.length)
        places = _places(lengths_B, value_N, self.length)
        token_NH = take_rows(self.of_behavior(behaviors.vectors_UV), behaviors.index_N.index_select(0, value_N))
        token_NH = token_NH + take_rows(self.position_LH, places.place_N)
        token_NH = token_NH + expand_rows(self.of_ad(torch.cat(list(queries), dim=1)), lengths_B, value_N.shape[0])
        return token_NH, places, lengths_B


class EncoderLayer(nn.Module):
    """x = norm(x + attention(x)), then norm(x + W relu(W' x)), W' twice as wide as x (Vaswani et al., 2017).

    As torch's TransformerEncoderLayer, but tokens are not padded, and there may be none.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.attention = TokenAttention(hidden)
        self.feed_forward = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, hidden))
        self.norm_attended, self.norm_fed = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def forward(self, token_NH: Tensor, places: TokenPlaces) -> Tensor:
        """Return the tokens after this layer, (N, H)."""
        token_NH = self.norm_attended(token_NH + self.attention(token_NH, places))
        result_NH: Tensor = self.norm_fed(token_NH + self.feed_forward(token_NH))
        return result_NH


class TokenAttention(nn.Module):
    """Scaled dot product of every token with all tokens of its sample, in some heads."""

    HEADS = 2

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.of_tokens = nn.Linear(hidden, 3 * hidden)
        self.of_heads = nn.Linear(hidden, hidden)

    def forward(self, token_NH: Tensor, places: TokenPlaces) -> Tensor:
        """Return the attention output of each token over the tokens of its sample, (N, H).

        A place without a token has no weight.
        """
        query, key, value, mask = self._asked(token_NH, places)
        with attention_kernels(query.device.type):
            heads = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended_NH = heads.transpose(1, 2).reshape(-1, token_NH.shape[1]).index_select(0, places.cell_N)
        result_NH: Tensor = self.of_heads(attended_NH)
        return result_NH

    def looked_at(self, token_NH: Tensor, places: TokenPlaces) -> Tensor:
        """Return the weight that each token has for the tokens of its sample, (N,): their mean, over the heads too."""
        query, key, _, mask = self._asked(token_NH, places)
        scores = (query @ key.transpose(2, 3)) * query.shape[-1] ** -0.5
        weight_BHLL = scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask.transpose(2, 3), 0.0)
        num_tokens_B1 = places.is_token_BL.sum(1, keepdim=True)
        weight_BL: Tensor = weight_BHLL.mean(1).sum(1) / num_tokens_B1
        return weight_BL.flatten().index_select(0, places.cell_N)

    def _asked(self, token_NH: Tensor, places: TokenPlaces) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries, keys and values, (B, heads, L, width) each, and which places have a token, (B, 1, 1, L)."""
        num_samples, length = places.is_token_BL.shape
        asked_N3H = self.of_tokens(token_NH)
        padded = asked_N3H.new_zeros(num_samples * length, asked_N3H.shape[1]).index_copy(0, places.cell_N, asked_N3H)
        split = padded.view(num_samples, length, 3, self.HEADS, token_NH.shape[1] // self.HEADS)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        return query, key, value, places.is_token_BL.view(num_samples, 1, 1, length)


def attention_kernels(device_type: str) -> AbstractContextManager[object]:
    """Choose what computes attention inside the block: on a GPU the plain products.

    Backward of the fused kernels that take a mask adds by atomics, in another order in each run; these sequences are
    too short for them to be worth that.
    """
    if device_type == "cpu":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels: AbstractContextManager[object] = sdpa_kernel(SDPBackend.MATH)
    return kernels


def _places(lengths_B: Tensor, value_N: Tensor, length: int) -> TokenPlaces:
    """`lengths_B`, `value_N`: the pairs of each sample."""
    place_L = torch.arange(length, device=lengths_B.device)
    start_B = lengths_B.cumsum(0) - lengths_B
    sample_B = torch.arange(lengths_B.shape[0], device=lengths_B.device)
    sample_N = expand_rows(sample_B, lengths_B, value_N.shape[0])
    place_N = torch.arange(value_N.shape[0], device=lengths_B.device) - start_B.index_select(0, sample_N)
    # The first position of a sample without behaviours counts as a token: softmax over none is not a number.
    is_token_BL = place_L < lengths_B.clamp_min(1).unsqueeze(1)
    return TokenPlaces(place_N, sample_N * length + place_N, is_token_BL)


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
        """Look up the values of each position of each group, (G, L, V), so that no size depends on the lengths."""
        place_L = torch.arange(self.length, device=lengths_G.device)
        is_there_GL = place_L < lengths_G.unsqueeze(1)
        next_GL = (lengths_G.cumsum(0) - lengths_G).unsqueeze(1) + place_L + 1
        rows_NV = take_rows(behaviors.vectors_UV, behaviors.index_N)
        rows_behind_zero = torch.cat([rows_NV.new_zeros(1, rows_NV.shape[1]), rows_NV])
        return rows_behind_zero.index_select(0, next_GL.masked_fill(~is_there_GL, 0).flatten())


AGGREGATORS: Mapping[Pooling, type[Aggregator]] = {
    "concat": ConcatPooling,
    "max": MaxPooling,
    "sum": SumPooling,
    "mean": MeanPooling,
    "attentive": AttentivePooling,
    "multi_query": MultiQueryPooling,
    "transformer": TransformerPooling,
}
