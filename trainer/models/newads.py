"""New ads: their IDs and pictures left out in training, and ID vectors predicted.

A new ad has a picture and no trained ID, so its ID vectors are near zero, where the networks hardly ever see them in
training. Here the vector of each of its own IDs is p(v) + row: p a small net of the ad's visual vectors v, learned from
clicks with all else, as in IDProxy (arXiv 2603.01590). The row learns the part of this ad that the picture does not
show; a new ad has p(v) and a row near zero, or in an exact table the trained row that ids without their own share.

E knows the pictures of its training by heart, in part; of a new picture it makes a vector that may mean less, or, with
poor features, nothing. The networks cannot tell, as long as all ads that they see are known: only ads that no part of
the model has seen can tell. With `model.image_dropout` the model learns to do without pictures, on some samples; an
evaluation scores the ads that training has not seen with and without them, and the way that ranks these better holds
from then on (trainer/loop/training.py).

With `model.id_dropout` the rows of an ad's own ID and of its image's ID become zero on some samples: both together, as
DropoutNet (Volkovs et al., NIPS 2017) drops the whole preference vector of an item, and nothing is scaled up in return.
Zero is the mean of rows before their first step. A picture that is dropped is zero as well, as one without features may
be (data.missing=zeros).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from featurestore.keys import BoolArray, Int64Array, unit_interval
from featurestore.lookup.ondevice import on_device
from trainer.config import ExactTableConfig, ModelConfig
from trainer.errors import ConfigError
from trainer.exchange.vectors import FieldVectors, take_rows
from trainer.models.layers import expand_rows, lengths_of, random_words, segment_max, value_rows, width_of
from trainer.problems import Problem
from trainer.samples.reader import Batch
from trainer.schema.fields import Field, Schema

HIDDEN = 32
"""Units of the net's hidden layer."""


class IdDropout:
    """Drops the own IDs, or the visual vectors, of the ads of some training samples.

    IDs are dropped of a share `rate` of samples, visual vectors of a share `image_rate`.
    """

    def __init__(self, schema: Schema, rate: float, seed: int, *, image_rate: float = 0.0) -> None:
        self._seed = seed
        images = tuple(field.name for field in schema.of_kind("content", side="ad"))
        self._dropped = {"id_dropout": (rate, own_ids_of_ads(schema)), "image_dropout": (image_rate, images)}

    def __call__(self, vectors: Mapping[str, FieldVectors], batch: Batch, step: int) -> dict[str, FieldVectors]:
        """Replace the vectors of dropped samples by zeros that have no gradient, for training step `step`."""
        result = dict(vectors)
        for what, (rate, fields) in self._dropped.items():
            if rate:
                dropped_B = dropped(self._seed, step, batch.places, rate, what)
                result |= {name: _zeroed(result[name], dropped_B) for name in fields if name in result}
        return result


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


def dropped(seed: int, step: int, place_B: Int64Array, rate: float, what: str = "id_dropout") -> BoolArray:
    """Return whether the samples at these places of the global batch are dropped, (B,).

    Counter based: the number at the sample's place in the global batch, of a stream for (seed, what, step). So it
    depends neither on the number of ranks nor on what was drawn before.
    """
    is_dropped_B: BoolArray = unit_interval(random_words(f"{seed}/{what}/{step}", place_B)) < rate
    return is_dropped_B


def _zeroed(field: FieldVectors, dropped_B: BoolArray) -> FieldVectors:
    """Point the values of dropped rows to a row of zeros behind the others."""
    vectors_UV = torch.cat([field.vectors_UV, field.vectors_UV.new_zeros(1, field.vectors_UV.shape[1])])
    assert isinstance(field.lengths_M, Tensor)
    of_row_B = on_device(dropped_B, field.index_N.device)
    dropped_N = torch.repeat_interleave(of_row_B, field.lengths_M, output_size=len(field.index_N))
    index_N = field.index_N.masked_fill(dropped_N, len(field.vectors_UV))
    return replace(field, vectors_UV=vectors_UV, index_N=index_N)


class IdProxy(nn.Module):
    """p(v) + row in place of the rows of the ad's own IDs; of a field with several values, of each of them.

    Parameters: (V + 1) * 32 + 33 * W for each ID field of width W; V is the width of all of the ad's visual vectors.
    """

    def __init__(self, images: Sequence[Field], own_ids: Sequence[Field], config: ModelConfig) -> None:
        super().__init__()
        self._images = tuple(field.name for field in images)
        self._has_lists = {field.name: field.kind == "multi_id" for field in own_ids}
        width = sum(width_of(field, config) for field in images)
        self.nets = nn.ModuleDict(
            {
                field.name: nn.Sequential(
                    nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, width_of(field, config))
                )
                for field in own_ids
            }
        )

    def forward(self, fields: Mapping[str, FieldVectors]) -> dict[str, FieldVectors]:
        """Replace the vectors of the ad's own IDs; each value then has a vector of its own."""
        visual_BV = torch.cat([value_rows(fields[name]) for name in self._images], dim=1)
        result = dict(fields)
        for name, net in self.nets.items():
            field, proxy_NV = fields[name], net(visual_BV)
            if self._has_lists[name]:
                proxy_NV = expand_rows(proxy_NV, lengths_of(field.lengths_M), field.index_N.shape[0])
            rows_NV = take_rows(field.vectors_UV, field.index_N) + proxy_NV
            index_N = torch.arange(rows_NV.shape[0], device=rows_NV.device)
            result[name] = replace(field, vectors_UV=rows_NV, index_N=index_N)
        return result


_ROUNDING = 1.01  # a row may be rounded in the type that it is kept in


class NewAds(nn.Module):
    """Replaces the visual vectors of new ads: by zeros, if pictures do not count.

    An ad is new while none of its own IDs has been trained: while every number of their rows lies where rows start, or
    is zero, as ID dropout leaves it. So nothing but the rows themselves has to be known, here and where ads are served.
    """

    counts: Tensor
    """Whether pictures of new ads count, 1 or 0."""

    def __init__(self, images: Sequence[Field], own_ids: Sequence[str], config: ModelConfig) -> None:
        super().__init__()
        self.images = tuple(field.name for field in images)
        self._own_ids = own_ids
        self._reach = config.id_init_std * 3**0.5 * _ROUNDING  # rows start uniformly around zero
        self.register_buffer("counts", torch.ones(()))

    @property
    def pictures_count(self) -> bool:
        """Return whether new ads keep their pictures."""
        return bool(self.counts)

    def decide(self, *, pictures_count: bool) -> None:
        """Settle whether new ads keep their pictures."""
        self.counts.fill_(pictures_count)

    def forward(self, fields: Mapping[str, FieldVectors]) -> dict[str, FieldVectors]:
        """Replace the visual vectors of new ads, except in training; each ad then has a vector of its own."""
        if self.training:
            return dict(fields)
        is_new_B1 = self._are_new(fields).unsqueeze(1)
        result = dict(fields)
        for name in self.images:
            known_BV = take_rows(fields[name].vectors_UV, fields[name].index_N)
            visual_BV = torch.where(is_new_B1, known_BV * self.counts, known_BV)
            index_N = torch.arange(visual_BV.shape[0], device=visual_BV.device)
            result[name] = FieldVectors(visual_BV, index_N, fields[name].lengths_M, fields[name].weights_N)
        return result

    @torch.no_grad()
    def _are_new(self, fields: Mapping[str, FieldVectors]) -> Tensor:
        """Return which ads have no trained row, (B,)."""
        farthest = []
        for name in self._own_ids:
            field = fields[name]
            rows_NV = field.vectors_UV.abs().index_select(0, field.index_N)
            farthest.append(segment_max(rows_NV, field.lengths_M).amax(1))
        return torch.stack(farthest).amax(0) <= self._reach


def build_new_ads(schema: Schema, fields: Sequence[Field], config: ModelConfig) -> NewAds | None:
    """Make `NewAds`, or return None if the model does not use it.

    It has none without `image_dropout`, or where the model sees no picture of the ad, or the ad has no own ID. An ID
    crossed with the context does not count: an ad's vector is made where there is none (trainer.prerank). Raises
    ConfigError where an ID table would hide all new ads.
    """
    images, own_ids = _images_and_ids(schema, fields)
    if not (config.image_dropout and images and own_ids):
        return None
    for name in (field.table_name for field in own_ids):
        table = config.tables.get(name)
        if isinstance(table, ExactTableConfig) and table.admit_after > 1:  # ids that wait share a row: never new
            raise ConfigError(Problem.NEW_IDS_SHARE_A_ROW, config.image_dropout, name, table.admit_after)
    return NewAds(images, [field.name for field in own_ids], config)


def build_id_proxy(schema: Schema, fields: Sequence[Field], config: ModelConfig) -> IdProxy | None:
    """Make `IdProxy`, or return None if it is off or not usable, as for `build_new_ads`."""
    images, own_ids = _images_and_ids(schema, fields)
    return IdProxy(images, own_ids, config) if config.id_proxy and images and own_ids else None


def _images_and_ids(schema: Schema, fields: Sequence[Field]) -> tuple[list[Field], list[Field]]:
    """Return the ad's content fields, and its own ID fields."""
    of_ads = own_ids_of_ads(schema)
    return (
        [field for field in fields if field.kind == "content" and field.side == "ad"],
        [field for field in fields if field.name in of_ads and not field.context],
    )
