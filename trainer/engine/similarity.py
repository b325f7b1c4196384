"""Similarity of behaviour images to the ad's image: a histogram for the model, and the nearest behaviours.

It comes from signatures, some bits of each image that its owner made of the feature, so that features need not travel.
No weight takes part: all of it is done a step ahead. The histogram is SimTier (Taobao, "Enhancing Taobao Display
Advertising with Multimodal Representations", CIKM 2024); to look only at the nearest behaviours is the search of SIM
(Pi et al., CIKM 2020) by images instead of categories. The store's features, standardised, are compared, not the
trained vectors.

Letters of shapes as in trainer/samples/reader.py; N pairs of a sample and a behaviour, T tiers, W words of a signature,
Q keys, D feature width.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featurestore.lookup.embedding import EmbeddingModel, EmbeddingService
from featurestore.lookup.partition import FeaturePartition
from trainer.comm import Comm
from trainer.config.options import ModelConfig
from trainer.errors import ConfigError
from trainer.exchange.exchange import KeyRequest, splits_of
from trainer.samples.columns import ranges
from trainer.samples.reader import Batch
from trainer.schema import Field
from trainer.stages import Stages

Int64 = NDArray[np.int64]
BITS = 512
WORDS = BITS // 64 + 1
"""The bits, and a last word that is 1 for an image with a feature."""
_BLOCK_ROWS = 64

Words = NDArray[np.uint64]
Scaling = tuple[NDArray[Any], NDArray[Any]]


class Planes:
    """Random planes through the mean of features: bit b of a signature says on which side of plane b a feature lies.

    Two vectors at angle a differ in a share a / pi of such bits (Charikar, "Similarity estimation techniques from
    rounding algorithms", STOC 2002): of 512, with a deviation of 0.07 rad at most. Features are standardised first:
    those of images point nearly all the same way, and only what differs from the mean distinguishes them.
    """

    def __init__(self, scaling: Scaling, seed: int = 0) -> None:
        """`scaling`: the mean of each dimension, and what to multiply by after it."""
        mean_D, inverse_std_D = scaling
        planes_DB = np.random.default_rng(seed).standard_normal((len(mean_D), BITS))
        self._mean_D = mean_D.astype(np.float32)
        self._planes_DB = (planes_DB * inverse_std_D[:, None]).astype(np.float32)

    def bits(self, features_QD: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return the bits of features, (Q, 64) bytes, each with the bit of its first plane lowest.

        Computed in blocks of one size, the last one filled up: so a row's bits do not depend on the number of rows."""
        bits_Q64 = np.empty((len(features_QD), BITS // 8), np.uint8)
        block_QD = np.zeros((_BLOCK_ROWS, len(self._mean_D)), np.float32)
        for start in range(0, len(features_QD), _BLOCK_ROWS):
            features_CD = features_QD[start : start + _BLOCK_ROWS]
            block_QD[: len(features_CD)] = features_CD - self._mean_D
            block_QD[len(features_CD) :] = 0
            bits_CB = (block_QD @ self._planes_DB)[: len(features_CD)] > 0
            bits_Q64[start : start + _BLOCK_ROWS] = np.packbits(bits_CB, axis=1, bitorder="little")
        return bits_Q64


def scaling_of(service: EmbeddingService) -> Scaling:
    """Return each dimension's mean and the networks' factor for the centred dimension, (D,) each."""
    model = next(iter(service.models.values()))
    assert isinstance(model, EmbeddingModel)
    return model.mean_D.cpu().numpy(), model.inverse_std_D.cpu().numpy()


class Signatures:
    """Signatures of one rank's features, by `Planes`.

    A signature depends on the feature, the scaling and the seed alone, not on the rank or on what else is asked. It
    is made at the first look at its image and kept: 72 bytes a row, and a product of D x 512 once.
    """

    def __init__(self, partition: FeaturePartition, scaling: Callable[[], Scaling], seed: int = 0) -> None:
        """`scaling` gives the mean of each dimension, and what to multiply by after it; asked at the first look."""
        self._partition, self._scaling, self._seed = partition, scaling, seed
        self._planes: Planes | None = None
        self._words_NW = np.zeros((partition.num_rows, WORDS), np.uint64)
        self._lock = threading.Lock()

    def of(self, keys_Q: NDArray[np.int64]) -> Words:
        """Return the signatures (Q, W) of keys that this rank owns; zeros for a key without a feature."""
        place_Q = self._partition.places(keys_Q)
        with self._lock:
            known_Q = place_Q >= 0
            new_Q = known_Q.copy()
            new_Q[known_Q] = self._words_NW[place_Q[known_Q], -1] == 0
            if new_Q.any():
                if self._planes is None:
                    self._planes = Planes(self._scaling(), self._seed)
                self._make(self._planes, keys_Q[new_Q], place_Q[new_Q])
            words_QW = np.zeros((len(keys_Q), WORDS), np.uint64)
            words_QW[known_Q] = self._words_NW[place_Q[known_Q]]
        return words_QW

    def _make(self, planes: Planes, keys_Q: NDArray[np.int64], place_Q: NDArray[np.int64]) -> None:
        for start in range(0, len(keys_Q), _BLOCK_ROWS):
            here = slice(start, start + _BLOCK_ROWS)
            features_QD = self._partition.codec.decode(self._partition.lookup(keys_Q[here]).features_UD)
            self._words_NW[place_Q[here], :-1] = planes.bits(features_QD).view(np.uint64)
            self._words_NW[place_Q[here], -1] = 1


def cosines(one_NW: Words, other_NW: Words) -> NDArray[np.float32]:
    """Estimate the cosine of each pair from their signatures, (N,); NaN where one of them has no feature."""
    differing_N = np.bitwise_count(one_NW[:, :-1] ^ other_NW[:, :-1]).sum(axis=1, dtype=np.int64)
    cosine_N: NDArray[np.float32] = np.cos(np.pi / BITS * differing_N).astype(np.float32)
    cosine_N[(one_NW[:, -1] & other_NW[:, -1]) == 0] = np.nan
    return cosine_N


@dataclass(frozen=True)
class Similarity:
    """The similarity of one behaviour field to the ad: a histogram for each sample, and its nearest behaviours."""

    tiers_BT: NDArray[np.float32]
    """log(1 + behaviours) whose cosine with the ad image lies in each T-th of [-1, 1], the lowest first."""
    nearest_N: Int64
    """Values of the behaviour field (their numbers in it), sample by sample, most similar first."""
    lengths_B: Int64
    """How many of them each sample has."""


def pairs_of_fields(fields: tuple[Field, ...], config: ModelConfig) -> dict[str, str]:
    """Return for each behaviour field the ad field that it is compared with: that of the same store.

    Empty where the model compares none. Raises ConfigError where there is not exactly one.
    """
    if not config.similarity_tiers and not config.similarity_top_k:
        return {}
    contents = [field for field in fields if field.kind == "content"]
    if galleries := [field.name for field in contents if field.gallery is not None]:
        raise ConfigError(
            f"model.similarity_tiers and similarity_top_k compare single images, and {galleries[0]} has a gallery "
            "of each ad or behaviour; set both to 0, or take the field with one image each into the schema instead"
        )
    pairs: dict[str, str] = {}
    for field in contents:
        if field.side == "user":
            ads = [other.name for other in contents if other.side == "ad" and other.store_name == field.store_name]
            if len(ads) != 1:
                raise ConfigError(
                    f"model.similarity_tiers and similarity_top_k compare field {field.name} with one content field of "
                    f"side ad and store {field.store_name}; the model uses {ads or 'none'}. Set model.images=both, or "
                    "set them to 0"
                )
            pairs[field.name] = ads[0]
    if not pairs:
        raise ConfigError(
            "model.similarity_tiers and similarity_top_k need behaviour images; set model.images=both, or set them to 0"
        )
    return pairs


def similarity(
    batch: Batch, behaviors: str, words_BW: Words, words_NW: Words, num_tiers: int, top_k: int
) -> Similarity:
    """Compare field `behaviors`, whose values have the signatures `words_NW`, with the ad images of `words_BW`.

    Of behaviours that are equally similar the newer one is nearer. One without a feature is in no tier and is no
    neighbour; a sample whose ad image has none has neither. Cost: 64 bytes read for each pair.
    """
    lengths_G = batch.fields[behaviors].lengths_M.astype(np.int64)
    starts_G = np.cumsum(lengths_G) - lengths_G
    lengths_B = lengths_G[batch.group_of_sample_B]
    value_N = ranges(starts_G[batch.group_of_sample_B], lengths_B)
    sample_N = np.repeat(np.arange(batch.num_samples), lengths_B)
    cosine_N = cosines(words_NW[value_N], words_BW[sample_N])
    known_N = ~np.isnan(cosine_N)
    value_N, sample_N, cosine_N = value_N[known_N], sample_N[known_N], cosine_N[known_N]
    tier_N = np.minimum(((cosine_N + 1) * (num_tiers / 2)).astype(np.int64), max(num_tiers - 1, 0))
    counts_T = np.bincount(sample_N * max(num_tiers, 1) + tier_N, minlength=batch.num_samples * num_tiers)
    tiers_BT = np.log1p(counts_T[: batch.num_samples * num_tiers]).astype(np.float32)
    nearest_N, kept_B = _nearest(sample_N, cosine_N, value_N, batch.num_samples, top_k)
    return Similarity(tiers_BT.reshape(batch.num_samples, num_tiers), nearest_N, kept_B)


def _nearest(
    sample_N: Int64, cosine_N: NDArray[np.float32], value_N: Int64, num_samples: int, top_k: int
) -> tuple[Int64, Int64]:
    if top_k == 0:
        return np.empty(0, np.int64), np.zeros(num_samples, np.int64)
    order_N = np.lexsort((value_N, -cosine_N, sample_N))
    counts_B = np.bincount(sample_N, minlength=num_samples)
    place_N = np.arange(len(order_N)) - np.repeat(np.cumsum(counts_B) - counts_B, counts_B)
    return value_N[order_N[place_N < top_k]], np.minimum(counts_B, top_k)


class ImageComparison:
    """Compares a batch's images of behaviours with those of its ads, by signatures that come from their owners."""

    def __init__(
        self,
        comm: Comm,
        config: ModelConfig,
        pairs: Mapping[str, str],
        source_of_field: Mapping[str, int],
        signatures_of_source: Mapping[int, Signatures],
        stages: Stages,
    ) -> None:
        """`pairs`: as `pairs_of_fields`; sources by their numbers in the exchange, the same on all ranks."""
        self._comm, self._config, self._stages = comm, config, stages
        self._pairs, self._source_of_field = pairs, source_of_field
        self._signatures = dict(sorted(signatures_of_source.items()))

    def similarities(self, batch: Batch, request: KeyRequest) -> dict[str, Similarity]:
        """Compare every behaviour field. All ranks call it; errors are kept in the request."""
        with self._stages.timed("exchange signatures", request.kind):
            words_of_source = {number: self._words(number, request) for number in self._signatures}
        tiers, top_k = self._config.similarity_tiers, self._config.similarity_top_k
        with self._stages.timed("compare images", request.kind):
            words = {
                name: words_of_source[number][request.fields[name].places_N]
                for name, number in self._source_of_field.items()
            }
            return {
                behaviors: similarity(batch, behaviors, words[ad], words[behaviors], tiers, top_k)
                for behaviors, ad in self._pairs.items()
            }

    def _words(self, number: int, request: KeyRequest) -> Words:
        """Return signatures (U, W) of the keys that this rank asked of a source, by one alltoall."""
        keys_R = request.received.keys_SR[number]
        reply_RW = np.zeros((len(keys_R), WORDS), np.uint64)
        try:
            if request.error is None:
                reply_RW = self._signatures[number].of(keys_R)
        except Exception as failure:  # any error: the other ranks are blocked on this rank's answer
            request.error = failure
        splits_P = splits_of(request.received.counts_PS[:, number])
        name = f"{request.kind}.signatures.{number}"
        words_U, _ = self._comm.alltoall(torch.from_numpy(reply_RW.view(np.int64)), splits_P, name=name)
        return words_U.numpy().view(np.uint64)
