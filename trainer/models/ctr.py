"""The base class of CTR models, and DICM: from vectors of fields to logits.

Letters of shapes as in trainer/samples/reader.py; W is any width.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.exchange.vectors import FieldVectors, take_rows
from trainer.models.layers import HiddenLayers, Mlp, StepPlace, used_fields, value_rows, width_of
from trainer.models.newads import build_id_proxy, build_new_ads
from trainer.models.pooling import AGGREGATORS, mean_pool, queries_of, sum_pool
from trainer.samples.reader import Batch
from trainer.schema.fields import Field, Schema, Side

Fields = Mapping[str, FieldVectors]
Dense = Mapping[str, Tensor]


class CtrModel(nn.Module):
    """Base of the models: fields in, one logit a sample out.

    Inputs are the ID vectors of every field (those of a multi_id pooled as `multi_hot` says), dense fields, the visual
    vectors of the ad and the aggregated visual vectors of the behaviours, each content field by its own E and
    aggregator.

    Attentive pooling queries with the ad's visual vectors; with images=behavior there are none, and the ad's ID vectors
    and dense values are the query. Multi-query pooling has both.

    With `image_products` there is, for each content field of the behaviours, the mean of their visual vectors times
    M a, element by element: a all vectors of the ad (visual, IDs, dense), M learned. The taste that behaviours show and
    the look of the ad, as its image or its IDs tell it, meet in products, which an MLP hardly makes of numbers side by
    side (docs/RESULTS.md).
    """

    starts_by_xavier = True
    """Whether its linear layers start with Glorot and Bengio's normal weights, or as torch's own layers."""

    def __init__(self, schema: Schema, config: ModelConfig, *, elsewhere: Collection[str] = ()) -> None:
        """`elsewhere`: user fields that the model takes in by itself, not pooled. Raises ConfigError."""
        super().__init__()
        self.fields = used_fields(schema, config)
        self._pooled_ids: dict[Side, list[Field]] = {
            side: [field for field in self._of(side, "id", "multi_id") if field.name not in elsewhere]
            for side in ("user", "ad")
        }
        self.place = StepPlace()
        self.hidden = HiddenLayers(config, self.place)
        self.pool = mean_pool if config.multi_hot == "mean" else sum_pool
        width = {field.name: width_of(field, config) for field in self.fields}
        behaviors = [field.name for field in self._of("user", "content")]
        of_ad = {
            "images": sum(width[field.name] for field in self._of("ad", "content")),
            "ids": sum(width[field.name] for field in self._of("ad", "id", "multi_id", "dense")),
        }
        self.query_sources = queries_of(config.pooling, of_ad) if behaviors else ()
        """Parts of the ad that the aggregators query with: its images, its ids."""
        queries = [of_ad[name] for name in self.query_sources]
        aggregators = {
            name: AGGREGATORS[config.pooling](width[name], queries, config, self.hidden) for name in behaviors
        }
        self.aggregators = nn.ModuleDict(aggregators)
        has_products = config.image_products and any(of_ad.values())
        self.products = nn.ModuleDict(
            {name: nn.Linear(sum(of_ad.values()), width[name], bias=False) for name in behaviors if has_products}
        )
        self.new_ads = build_new_ads(schema, self.fields, config)
        self.id_proxy = build_id_proxy(schema, self.fields, config)
        self._of_pictures = [part for part in (self.new_ads, self.id_proxy) if part is not None]
        taken_in = [w for name, w in width.items() if name not in elsewhere and name not in aggregators]
        self.input_width = sum(taken_in) + sum(each.width for each in aggregators.values())
        self.input_width += sum(width[name] for name in self.products)

    def forward(self, fields: Fields, dense: Dense, group_of_sample_B: Tensor) -> Tensor:
        """Return logits (B,). `fields`: id, multi_id, content; `dense`: (M, width) each; M = G or B by side."""
        raise NotImplementedError

    def with_pictures_of_ads(self, fields: Fields) -> dict[str, FieldVectors]:
        """Make the inputs of `forward` from looked-up vectors; ads' pictures replace new IDs if the model does so."""
        result = dict(fields)
        for part in self._of_pictures:
            result = part(result)
        return result

    def check(self, batch: Batch) -> None:
        """Raise DataError where a batch does not fit this model; called before its keys are exchanged."""

    def inputs(self, fields: Fields, dense: Dense, group_of_sample_B: Tensor) -> Tensor:
        """Return all that the model knows of each sample, (B, input_width)."""
        user, ad = self.side_inputs("user", fields, dense), self.side_inputs("ad", fields, dense)
        return self.concat_inputs(user, ad, fields, group_of_sample_B)

    def side_inputs(self, side: Side, fields: Fields, dense: Dense) -> list[Tensor]:
        """Return ID vectors and dense values of one side, (M, W) for each field."""
        return [*self.id_vectors(side, fields), *self.dense_values(side, dense)]

    def concat_inputs(self, user: list[Tensor], ad: list[Tensor], fields: Fields, group_of_sample_B: Tensor) -> Tensor:
        """Make `inputs` from the results of `side_inputs` for both sides."""
        images = self.images(fields, group_of_sample_B, ad)
        return torch.cat([*self.of_group(user, group_of_sample_B), *ad, *images], dim=1)

    def id_vectors(self, side: Side, fields: Fields) -> list[Tensor]:
        """Return ID vectors of one side, (M, W) for each field."""
        return [
            self.pool(fields[field.name]) if field.kind == "multi_id" else value_rows(fields[field.name])
            for field in self._pooled_ids[side]
        ]

    def dense_values(self, side: Side, dense: Dense) -> list[Tensor]:
        """Return dense values of one side, (M, W) for each field."""
        return [dense[field.name] for field in self._of(side, "dense")]

    def images(self, fields: Fields, group_of_sample_B: Tensor, ad: list[Tensor]) -> list[Tensor]:
        """Collect the image inputs: the ad's visual vectors and the behaviours' aggregated ones, (B, W) a field.

        Then the products of their means with the ad. `ad`: its `side_inputs`.
        """
        visual = [value_rows(fields[field.name]) for field in self._of("ad", "content")]
        of_ad = {"images": visual, "ids": ad}
        queries = [torch.cat(of_ad[name], dim=1) for name in self.query_sources]
        pooled = [pool(fields[name], group_of_sample_B, queries) for name, pool in self.aggregators.items()]
        products = []
        if self.products:
            ad_BW = torch.cat([*visual, *ad], dim=1)
            means = {name: take_rows(mean_pool(fields[name]), group_of_sample_B) for name in self.products}
            products = [means[name] * layer(ad_BW) for name, layer in self.products.items()]
        return [*visual, *pooled, *products]

    def of_group(self, user: list[Tensor], group_of_sample_B: Tensor) -> list[Tensor]:
        """Put the user's part (G, W) together once per group, and hand it to the group's samples: (B, W), or none."""
        return [take_rows(torch.cat(user, dim=1), group_of_sample_B)] if user else []

    def _of(self, side: Side, *kinds: str) -> list[Field]:
        return [field for field in self.fields if field.side == side and field.kind in kinds]


class Dicm(CtrModel):
    """All inputs side by side go through an MLP, 200-80-1 by default (Ge et al., CIKM 2018).

    The paper ends in two outputs and a softmax; of two logits only the difference matters, so one logit and a sigmoid
    are the same model.
    """

    def __init__(self, schema: Schema, config: ModelConfig) -> None:
        super().__init__(schema, config)
        self.mlp = Mlp([self.input_width, *config.mlp, 1], self.hidden)

    def forward(self, fields: Fields, dense: Dense, group_of_sample_B: Tensor) -> Tensor:
        logit_B1: Tensor = self.mlp(self.inputs(fields, dense, group_of_sample_B))
        return logit_B1.squeeze(1)
