"""Two towers for pre-ranking: the user's vector and the ad's vector, and a logit that is their inner product.

So the vectors of all ads can be made ahead and searched (jobs/build_ad_index.py). Letter here: W width of both towers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.config.options import ModelConfig
from trainer.errors import ConfigError
from trainer.exchange.exchange import FieldVectors
from trainer.exchange.sums import take_rows
from trainer.models.ctr import CtrModel, Dense, Fields, one_each
from trainer.models.fields import width_of
from trainer.models.layers import Mlp
from trainer.models.pooling.aggregators import sum_pool
from trainer.schema import Field, Schema


class TwoTower(CtrModel):
    """Logit = <user vector, ad vector> + bias + what the context of the impression adds.

    The pre-rank variant of "Image Matters" (arXiv 1711.06505): the user's side gets the user's ID vectors, dense fields
    and the summed visual vectors of the behaviours, the ad's side those of the ad; each goes through an MLP of its own,
    with hidden layers as `mlp` says and `tower_width` outputs. `pooling` is not used: what looks at the ad cannot be
    part of the user's vector.

    There is no temperature and no normalisation: both towers end in a linear layer, which carries the scale. So the
    inner product itself, as faiss takes it, orders ads by their logits. Fields of the schema with `context: true`
    (the scene, say) belong to the impression and not to the ad; a linear layer on them adds the same number to every
    ad that competes for one impression, so the order does not depend on them.
    """

    def __init__(self, schema: Schema, config: ModelConfig) -> None:
        if config.similarity_tiers or config.similarity_top_k:
            raise ConfigError(
                "model.base=two_tower keeps user and ad apart, and similarity_tiers and similarity_top_k compare them; "
                "set both to 0, or set model.base=mlp"
            )
        if config.dropout or config.batch_norm or config.activation == "dice":
            raise ConfigError(
                "model.base=two_tower makes the user's vector once for all ads, so its layers have no row for each "
                "sample; set model.dropout=0, model.batch_norm=false and model.activation=relu or prelu"
            )
        super().__init__(schema, config.model_copy(update={"pooling": "sum", "image_products": False}))
        self.width = config.tower_width
        self.user_fields = tuple(field for field in self.fields if field.side == "user")
        self.ad_fields = tuple(field for field in self.fields if field.side == "ad" and not field.context)
        self.context_fields = tuple(field for field in self.fields if field.context)
        for side, fields in (("user", self.user_fields), ("ad", self.ad_fields)):
            if not fields:
                raise ConfigError(
                    f"model.base=two_tower needs a field of side {side}, context fields aside, and the model uses none;"
                    " add one to the schema, or set model.base=mlp"
                )
        self.user_tower = Mlp([_width(self.user_fields, config), *config.mlp, self.width], self.hidden)
        self.ad_tower = Mlp([_width(self.ad_fields, config), *config.mlp, self.width], self.hidden)
        self.bias = nn.Parameter(torch.zeros(1))
        self.context = nn.Linear(_width(self.context_fields, config), 1, bias=False) if self.context_fields else None

    def forward(self, fields: Fields, dense: Dense, group_of_sample_B: Tensor) -> Tensor:
        user_GW = self.user_vectors(fields, dense)
        ad_BW = self.ad_vectors(fields, dense)
        logit_B = (take_rows(user_GW, group_of_sample_B) * ad_BW).sum(dim=1) + self.bias
        if self.context is not None:
            logit_B = logit_B + self.context(self._inputs(self.context_fields, fields, dense)).squeeze(1)
        return logit_B

    def user_vectors(self, fields: Fields, dense: Dense) -> Tensor:
        """Return one vector a group, (G, W), for all samples of the group."""
        user_GW: Tensor = self.user_tower(self._inputs(self.user_fields, fields, dense))
        return user_GW

    def ad_vectors(self, fields: Fields, dense: Dense) -> Tensor:
        """Return one vector a sample, (B, W), of the ad's fields alone: any rows of ads will do."""
        ad_BW: Tensor = self.ad_tower(self._inputs(self.ad_fields, fields, dense))
        return ad_BW

    def _inputs(self, fields: Sequence[Field], vectors: Fields, dense: Dense) -> Tensor:
        """Put vectors and dense values of these fields side by side, (M, width), several vectors of a row as one."""
        parts = [dense[f.name] if f.kind == "dense" else self._of_rows(f, vectors[f.name]) for f in fields]
        return torch.cat(parts, dim=1)

    def _of_rows(self, field: Field, values: FieldVectors) -> Tensor:
        if field.kind == "multi_id":
            return self.pool(values)
        return sum_pool(values) if field.kind == "content" and field.side == "user" else one_each(values)


def _width(fields: Sequence[Field], config: ModelConfig) -> int:
    """Count the numbers that `_inputs` makes of a row."""
    return sum(width_of(field, config) for field in fields)
