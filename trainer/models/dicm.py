"""DICM, the Deep Image CTR Model: Embedding&MLP over ID fields, and visual vectors of the ad and the behaviours."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.exchange import FieldVectors
from trainer.models.aggregators import AttentivePooling, SumPooling, sum_pool
from trainer.models.layers import Mlp, take_rows
from trainer.options import ModelConfig
from trainer.schema import Field, Schema, Side


def used_fields(schema: Schema, config: ModelConfig) -> tuple[Field, ...]:
    """The fields that the model looks at: all ID and dense ones, and content ones as `images` says.

    Raises ConfigError where `images` asks for a side on which the schema has no content field.
    """
    sides: dict[str, set[Side]] = {"none": set(), "ad": {"ad"}, "behavior": {"user"}, "both": {"user", "ad"}}
    wanted = sides[config.images]
    for side in sorted(wanted):
        if not any(field.kind == "content" and field.side == side for field in schema.fields):
            raise ConfigError(
                f"model.images={config.images} needs a field of kind content on side {side}, and the schema has none; "
                "add one to the schema, or set model.images to what it has"
            )
    fields = tuple(f for f in schema.fields if f.kind != "content" or f.side in wanted)
    if not any(field.is_id or field.kind == "content" for field in fields):
        raise ConfigError("the schema has no field of kind id, multi_id or content; the model needs one")
    return fields


class Dicm(nn.Module):
    """Logit of a click for each sample.

    ID vectors of every field (multi_id summed), dense fields, the ad's visual vector and the aggregated visual vectors
    of the behaviours are concatenated and go through an MLP, 200-80-1 by default. The paper ends in two outputs and a
    softmax; of two logits only the difference matters, so one logit and a sigmoid are the same model.

    Attentive pooling asks with the ad's visual vector; with images=behavior there is none, and the ad's ID vectors ask,
    as in the second channel of the paper's multi-query pooling.
    """

    def __init__(self, schema: Schema, config: ModelConfig) -> None:
        super().__init__()
        self.fields = used_fields(schema, config)
        visual, id_width = config.visual_width, config.id_width
        user_width, ad_id_width, ad_visual_width = 0, 0, 0
        for field in self.fields:
            if field.kind == "content":
                ad_visual_width += visual * (field.side == "ad")
                continue
            width = field.width or (id_width if field.is_id else 1)
            user_width += width * (field.side == "user")
            ad_id_width += width * (field.side == "ad")
        query_width = ad_visual_width or ad_id_width
        behaviors = [f.name for f in self.fields if f.kind == "content" and f.side == "user"]
        if behaviors and config.pooling == "attentive" and query_width == 0:
            raise ConfigError("model.pooling=attentive needs a field on side ad to ask with; set model.pooling=sum")
        self.aggregators = nn.ModuleDict()
        for name in behaviors:
            self.aggregators[name] = (
                SumPooling(visual)
                if config.pooling == "sum"
                else AttentivePooling(visual, query_width, config.attention_hidden)
            )
        inputs = user_width + ad_id_width + ad_visual_width + visual * len(behaviors)
        self.mlp = Mlp([inputs, *config.mlp, 1])

    def forward(
        self, fields: Mapping[str, FieldVectors], dense: Mapping[str, Tensor], group_of_sample_B: Tensor
    ) -> Tensor:
        """Logits (B,). `fields`: id, multi_id and content; `dense`: (M, width) each; M = G or B by the field's side."""
        user = self._inputs("user", fields, dense)
        ad = self._inputs("ad", fields, dense)
        ad_visual = [_one_each(fields[f.name]) for f in self.fields if f.kind == "content" and f.side == "ad"]
        query = ad_visual or ad
        query_BW = torch.cat(query, dim=1) if query else None
        # The user's part is put together once per group and then handed to the group's samples.
        of_user = [take_rows(torch.cat(user, dim=1), group_of_sample_B)] if user else []
        pooled = [pool(fields[name], group_of_sample_B, query_BW) for name, pool in self.aggregators.items()]
        logit_B1: Tensor = self.mlp(torch.cat([*of_user, *ad, *ad_visual, *pooled], dim=1))
        return logit_B1.squeeze(1)

    def _inputs(self, side: Side, fields: Mapping[str, FieldVectors], dense: Mapping[str, Tensor]) -> list[Tensor]:
        """ID vectors and dense values of one side, (M, W) each."""
        inputs: list[Tensor] = []
        for field in self.fields:
            if field.side != side or field.kind == "content":
                continue
            if field.kind == "dense":
                inputs.append(dense[field.name])
            else:
                inputs.append(
                    sum_pool(fields[field.name]) if field.kind == "multi_id" else _one_each(fields[field.name])
                )
        return inputs


def _one_each(field: FieldVectors) -> Tensor:
    """The vector of each row of a field that has one value a row, (M, V)."""
    return take_rows(field.vectors_UV, field.index_N)
