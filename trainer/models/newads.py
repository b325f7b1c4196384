"""New ads: their IDs and pictures left out in training, and ID vectors predicted.

A new ad has a picture and no trained ID, so its ID vectors are near zero, where the networks hardly ever see them in
training. Here the vector of each of its own IDs is p(v) + row: p a small net of the ad's visual vectors v, learned from
clicks with all else, as in IDProxy (arXiv 2603.01590). The row learns what the picture does not say of this ad; a new
ad has p(v) and a row near zero, or in an exact table the trained row that ids without their own share.

E knows the pictures of its training by heart, in part; of a new picture it makes a vector that may mean less, or, with
poor features, nothing. The networks cannot tell, as long as all ads that they see are known: only ads that no part of
the model has seen can tell. With `model.image_dropout` the model learns to do without pictures, on some samples; an
evaluation scores the ads that training has not seen with and without them, and what ranks these better holds from then
on (trainer/loop/training.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from trainer.config.options import ExactTableConfig, ModelConfig
from trainer.errors import ConfigError
from trainer.exchange.vectors import FieldVectors, take_rows
from trainer.models.layers import expand_rows, lengths_of, own_ids_of_ads, segment_max, value_rows, width_of
from trainer.schema import Field, Schema

HIDDEN = 32
"""Units of the net's hidden layer."""


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
    _check_tables([field.table_name for field in own_ids], config)
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


def _check_tables(own_tables: Sequence[str], config: ModelConfig) -> None:
    """Refuse tables in which new ids wait for a row: they share a trained one, and would never be those of a new ad."""
    for name in own_tables:
        table = config.tables.get(name)
        if isinstance(table, ExactTableConfig) and table.admit_after > 1:
            raise ConfigError(
                f"model.image_dropout={config.image_dropout} takes an ad for new while its ID rows are untrained, and "
                f"with model.tables.{name}.admit_after={table.admit_after} new ids share a trained row; set "
                f"model.tables.{name}.admit_after=1, or model.image_dropout=0"
            )
