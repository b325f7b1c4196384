"""Dropout of IDs and of pictures: in training, some samples show their ad without one of the two.

So the model learns to go by the rest.

A new ad has a known category and a picture, but rows that nobody trained: of its own ID and of its image's ID. After
DropoutNet (Volkovs et al., NIPS 2017), which drops the whole preference vector of an item, both are dropped together,
and nothing is scaled up in return. They become zero, which is the mean of rows before their first step. A picture that
is dropped is zero as well, as one without features may be (data.missing=zeros).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featurestore.keys import splitmix64, stream_start, unit_interval
from featurestore.lookup.embedding import on_device
from trainer.exchange.exchange import FieldVectors
from trainer.samples.batch import Batch
from trainer.schema import Schema

HELD_OUT_RATE = 0.5
"""Of the samples of ads whose images are held out of E's training (model.image_holdout)."""


HeldOut = Callable[[NDArray[np.int64]], NDArray[np.bool_]]


class IdDropout:
    """Drops the own IDs, or the visual vectors, of the ads of some training samples.

    IDs are dropped of a share `rate` of samples, and of half of those whose ad's images are all held out; visual
    vectors of a share `image_rate`.

    `held_out`: by content field of the ad, which of the images of these keys are.
    """

    def __init__(
        self,
        schema: Schema,
        rate: float,
        seed: int,
        held_out: Mapping[str, HeldOut] | None = None,
        *,
        image_rate: float = 0.0,
    ) -> None:
        self.rate, self._seed, self._held_out, self._image_rate = rate, seed, held_out or {}, image_rate
        self.fields = own_ids_of_ads(schema)
        self._images = tuple(field.name for field in schema.of_kind("content", side="ad"))

    def __call__(self, vectors: Mapping[str, FieldVectors], batch: Batch, step: int) -> dict[str, FieldVectors]:
        """Replace the vectors of dropped samples by zeros that have no gradient, for training step `step`."""
        result = dict(vectors)
        if self.rate or self._held_out:
            rate: float | NDArray[np.float64] = self.rate
            if self._held_out:
                rate = np.where(_all_held_out(batch, self._held_out), max(self.rate, HELD_OUT_RATE), self.rate)
            dropped_B = dropped(self._seed, step, batch.places, rate)
            result |= {name: _zeroed(result[name], dropped_B) for name in self.fields if name in result}
        if self._image_rate:
            dropped_B = dropped(self._seed, step, batch.places, self._image_rate, "image_dropout")
            result |= {name: _zeroed(result[name], dropped_B) for name in self._images if name in result}
        return result


def _all_held_out(batch: Batch, held_out: Mapping[str, HeldOut]) -> NDArray[np.bool_]:
    """Return which ads have images that are all held out, (B,): of each content one, or a gallery."""
    num_images_B, num_known_B = np.zeros(batch.num_samples), np.zeros(batch.num_samples)
    for name, is_held_out in held_out.items():
        is_known_N = ~is_held_out(batch.fields[name].values_N)
        sizes_B = batch.galleries[name].values_N if name in batch.galleries else np.ones(batch.num_samples, np.int64)
        sample_N = np.repeat(np.arange(batch.num_samples), sizes_B)
        num_images_B += sizes_B
        num_known_B += np.bincount(sample_N, weights=is_known_N, minlength=batch.num_samples)
    is_all_B: NDArray[np.bool_] = (num_known_B == 0) & (num_images_B > 0)
    return is_all_B


def own_ids_of_ads(schema: Schema) -> tuple[str, ...]:
    """Return the fields whose value is new with a new ad: `new_ad_field`, and the IDs of its contents.

    An ID field of the ad side is a content's ID when it reads the column of a content field. One that crosses such
    columns with others is new with a new ad too.
    """
    own = {f.column_name for f in schema.fields if f.name == schema.new_ad_field}
    own |= {field.column_name for field in schema.of_kind("content", side="ad")}
    return tuple(
        field.name
        for field in schema.of_kind("id", "multi_id", side="ad")
        if field.name == schema.new_ad_field or own & {field.column_name, *(field.columns or ())}
    )


def dropped(
    seed: int, step: int, place_B: NDArray[np.int64], rate: float | NDArray[np.float64], what: str = "id_dropout"
) -> NDArray[np.bool_]:
    """Return whether the samples at these places of the global batch are dropped, (B,). `rate`: one, or each's.

    Counter based: the number at the sample's place in the global batch, of a stream for (seed, what, step). So it
    depends neither on the number of ranks nor on what was drawn before.
    """
    is_dropped_B: NDArray[np.bool_] = unit_interval(random_words(f"{seed}/{what}/{step}", place_B)) < rate
    return is_dropped_B


def random_words(stream: str, number_N: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the random 64 bits of these numbers in a stream, (N,), whatever was drawn before.

    They are splitmix64 of the stream's start plus the number.
    """
    counter_N = number_N.astype(np.uint64) + stream_start(stream)
    return splitmix64(counter_N.view(np.int64))


def _zeroed(field: FieldVectors, dropped_B: NDArray[np.bool_]) -> FieldVectors:
    """Point the values of dropped rows to a row of zeros behind the others."""
    vectors_UV = torch.cat([field.vectors_UV, field.vectors_UV.new_zeros(1, field.vectors_UV.shape[1])])
    assert isinstance(field.lengths_M, Tensor)
    of_row_B = on_device(dropped_B, field.index_N.device)
    dropped_N = torch.repeat_interleave(of_row_B, field.lengths_M, output_size=len(field.index_N))
    index_N = field.index_N.masked_fill(dropped_N, len(field.vectors_UV))
    return replace(field, vectors_UV=vectors_UV, index_N=index_N)
