"""What the picture of a new ad is worth: learned on ads whose pictures E learns nothing from (model.image_holdout).

E knows the pictures of its training by heart, in part; of a new picture it makes a vector that may mean less, or, with
poor features, nothing. The networks cannot tell, as long as all ads that they see are known. So a share of the images
is held out of E's training, and half of their samples lose their ad's own IDs (trainer/models/id_dropout.py): these
look as a new ad will. A new ad's visual vector goes through a scale and a shift of its own, which
these samples alone train.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trainer.config.options import ExactTableConfig, ModelConfig
from trainer.errors import ConfigError
from trainer.exchange.exchange import FieldVectors
from trainer.exchange.sums import take_rows
from trainer.models.fields import width_of
from trainer.models.id_dropout import own_ids_of_ads
from trainer.models.idproxy import IdProxy
from trainer.models.layers import segment_max
from trainer.schema import Field, Schema

_ROUNDING = 1.01  # a row may have been rounded on its way (exchange.wire_dtype)


class NewAds(nn.Module):
    """scale * v + shift in place of the visual vectors v of new ads, scale and shift one number an element.

    An ad is new while none of its own IDs has been trained: while every number of their rows lies where rows start, or
    is zero, as ID dropout leaves it. So nothing but the rows themselves has to be known, here and where ads are served.
    """

    def __init__(self, images: Sequence[Field], own_ids: Sequence[str], config: ModelConfig) -> None:
        super().__init__()
        self.images = tuple(field.name for field in images)
        self._own_ids = own_ids
        self._reach = config.id_init_std * 3**0.5 * _ROUNDING  # rows start uniformly around zero
        self.scale = nn.ParameterDict({f.name: nn.Parameter(torch.ones(width_of(f, config))) for f in images})
        self.shift = nn.ParameterDict({f.name: nn.Parameter(torch.zeros(width_of(f, config))) for f in images})

    def forward(self, fields: Mapping[str, FieldVectors]) -> dict[str, FieldVectors]:
        """Replace the visual vectors of new ads; each ad then has a vector of its own."""
        is_new_B1 = self._are_new(fields).unsqueeze(1)
        result = dict(fields)
        for name in self.images:
            visual_BV = take_rows(fields[name].vectors_UV, fields[name].index_N)
            visual_BV = torch.where(is_new_B1, torch.addcmul(self.shift[name], visual_BV, self.scale[name]), visual_BV)
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
    """Make `NewAds`; None where no image is held out, or the model sees no picture of the ad, or the ad has no own ID.
    An ID crossed with the context does not count: an ad's vector is made where there is none (trainer.prerank). Raises
    ConfigError where an ID table would hide all new ads."""
    images, own_ids = _images_and_ids(schema, fields)
    if not (config.image_holdout and images and own_ids):
        return None
    _check_tables([field.table_name for field in own_ids], config)
    return NewAds(images, [field.name for field in own_ids], config)


def build_id_proxy(schema: Schema, fields: Sequence[Field], config: ModelConfig) -> IdProxy | None:
    """Make `IdProxy`; None where it is not asked for, or there is nothing for it, as for `build_new_ads`."""
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
                f"model.image_holdout={config.image_holdout} takes an ad for new while its ID rows are untrained, and "
                f"with model.tables.{name}.admit_after={table.admit_after} new ids share a trained row; set "
                f"model.tables.{name}.admit_after=1, or model.image_holdout=0"
            )
