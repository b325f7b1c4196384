"""A transformer over a user's behaviours with the ad beside each: what a behaviour means depends on ad and neighbours.

Letters here: N tokens, which are (sample, behaviour) pairs one after the other without padding, L places of behaviours,
H hidden width.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.exchange.exchange import FieldVectors
from trainer.exchange.sums import take_rows
from trainer.models.layers import expand_rows, segment_max, segment_sum
from trainer.models.pooling.attention import PairWeights, pairs

_POSITION_SCALE = 0.02


@dataclass(frozen=True)
class TokenPlaces:
    """Places of tokens in the padded (B, L) of their samples."""

    place_N: Tensor
    """Of the token in its sample; 0: the newest behaviour."""
    cell_N: Tensor
    """sample x L + place."""
    is_token_BL: Tensor


class TransformerPooling(nn.Module):
    """Early fusion of the ad with each behaviour, then encoder layers, then [the maximum, the newest], (B, 2 H).

    As in TransAct (Xia et al., KDD 2023, section 3.2), token k is [v_k, q] through a linear layer, v_k the visual
    vector of behaviour k and q the ad's vectors, plus a vector of the place k. The output is the maximum over the
    tokens, element by element, beside the token of the newest behaviour. A group without behaviours gives zero. No
    dropout: its random numbers would depend on the number of ranks.

    Cost: the ad is part of every token, so all of it is computed once a sample, not once a group. For each sample of n
    behaviours and each layer that is about 16 n H^2 operations, and 4 H L^2 in attention, which alone is padded;
    backward takes twice that. With the preset's sizes and 16 behaviours: 0.4 million a sample forward. Forward and
    backward of 1,024 samples with 17 behaviours each took 62 ms of one processor core, 96 with two layers; attentive
    pooling took 8.
    """

    def __init__(
        self, width: int, query_widths: Sequence[int], *, hidden: int, num_heads: int, num_layers: int, length: int
    ) -> None:
        """The newest `length` behaviours are looked at."""
        super().__init__()
        self.width, self.length = 2 * hidden, length
        # The linear layer on [v_k, q] is a sum: of behaviours once a unique image, of ads once a sample.
        self.of_behavior = nn.Linear(width, hidden, bias=False)
        self.of_ad = nn.Linear(sum(query_widths), hidden)
        self.position_LH = nn.Parameter(_POSITION_SCALE * torch.randn(length, hidden))
        self.layers = nn.ModuleList(EncoderLayer(hidden, num_heads) for _ in range(num_layers))

    def forward(self, behaviors: FieldVectors, group_of_sample_B: Tensor, queries: Sequence[Tensor]) -> Tensor:
        """Return the pooled vectors (B, width) for the ad's vectors (B, W) each."""
        token_NH, places, lengths_B = self._tokens(behaviors, group_of_sample_B, queries)
        for layer in self.layers:
            token_NH = layer(token_NH, places)
        newest_BH = segment_sum(token_NH.masked_fill(places.place_N.unsqueeze(1) > 0, 0.0), lengths_B)
        return torch.cat([segment_max(token_NH, lengths_B), newest_BH], dim=1)

    def weights(self, behaviors: FieldVectors, group_of_sample_B: Tensor, queries: Sequence[Tensor]) -> PairWeights:
        """Return how much the tokens of a sample look at each behaviour in the last layer, (N, 1).

        It is the mean over its heads and over the tokens that look. Unlike the weights of `AttentivePooling` nothing is
        multiplied by it.
        """
        token_NH, places, lengths_B = self._tokens(behaviors, group_of_sample_B, queries)
        *before, last = self.layers
        for layer in before:
            token_NH = layer(token_NH, places)
        return PairWeights(cast(EncoderLayer, last).attention.looked_at(token_NH, places).unsqueeze(1), lengths_B)

    def _tokens(
        self, behaviors: FieldVectors, group_of_sample_B: Tensor, queries: Sequence[Tensor]
    ) -> tuple[Tensor, TokenPlaces, Tensor]:
        """Return the tokens before the first layer (N, H), their places, and tokens a sample."""
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

    def __init__(self, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.attention = TokenAttention(hidden, num_heads)
        self.feed_forward = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, hidden))
        self.norm_attended, self.norm_fed = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def forward(self, token_NH: Tensor, places: TokenPlaces) -> Tensor:
        """Return the tokens after this layer, (N, H)."""
        token_NH = self.norm_attended(token_NH + self.attention(token_NH, places))
        result_NH: Tensor = self.norm_fed(token_NH + self.feed_forward(token_NH))
        return result_NH


class TokenAttention(nn.Module):
    """Scaled dot product of every token with all tokens of its sample, in `num_heads` heads."""

    def __init__(self, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.of_tokens = nn.Linear(hidden, 3 * hidden)
        self.of_heads = nn.Linear(hidden, hidden)

    def forward(self, token_NH: Tensor, places: TokenPlaces) -> Tensor:
        """Return what each token takes from the tokens of its sample, (N, H).

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
        split = padded.view(num_samples, length, 3, self.num_heads, token_NH.shape[1] // self.num_heads)
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
    # The first place of a sample without behaviours counts as a token: softmax over none is no number.
    is_token_BL = place_L < lengths_B.clamp_min(1).unsqueeze(1)
    return TokenPlaces(place_N, sample_N * length + place_N, is_token_BL)
