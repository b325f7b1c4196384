"""DIN, the Deep Interest Network: the behaviours' IDs are weighed by the ad's; then an MLP as in DICM."""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.config.options import ModelConfig
from trainer.errors import ConfigError, DataError
from trainer.models.ctr import CtrModel, Dense, Fields, one_each
from trainer.models.fields import used_fields, width_of
from trainer.models.layers import Mlp
from trainer.models.pooling.attention import BehaviorAttention
from trainer.samples.batch import Batch
from trainer.schema import Field, Schema


class Din(CtrModel):
    """Attention over behaviour IDs by the ad's IDs (Zhou et al., KDD 2018), beside the aggregated images of DICM.

    The behaviours are the multi_id fields of side user that share their table with an id field of side ad, as
    behavior_item and ad_item do: value k of all of them describes behaviour k. Fields `beside` one of them, as the
    behaviours' ages, are part of the behaviour too. Other fields are pooled as in DICM.
    """

    def __init__(self, schema: Schema, config: ModelConfig) -> None:
        """Raises ConfigError where no such field is there."""
        pairs = paired_fields(used_fields(schema, config))
        if not pairs:
            raise ConfigError(
                "model.base=din needs a multi_id field on side user that shares its table with an id field on side ad, "
                "as behavior_item and ad_item share table item; add it to the schema, or set model.base=mlp"
            )
        self.behaviors = behaviors_of(used_fields(schema, config))
        self._ads = [ad.name for _, ad in pairs]
        super().__init__(schema, config, elsewhere=self.behaviors)
        query_width = sum(width_of(ad, config) for _, ad in pairs)
        beside = [field for field in self.fields if field.name in self.behaviors[len(pairs) :]]
        width = query_width + sum(width_of(field, config) for field in beside)
        self.attention = BehaviorAttention(width, query_width, config.attention_hidden, self.hidden)
        self.mlp = Mlp([self.input_width + self.attention.width, *config.mlp, 1], self.hidden)

    def forward(self, fields: Fields, dense: Dense, group_of_sample_B: Tensor) -> Tensor:
        query_BW = torch.cat([one_each(fields[name]) for name in self._ads], dim=1)
        interest_BW = self.attention([fields[name] for name in self.behaviors], group_of_sample_B, query_BW)
        logit_B1: Tensor = self.mlp(torch.cat([self.inputs(fields, dense, group_of_sample_B), interest_BW], dim=1))
        return logit_B1.squeeze(1)

    def check(self, batch: Batch) -> None:
        check_equal_lists(batch, self.behaviors)


def behaviors_of(fields: Collection[Field]) -> list[str]:
    """Name the fields of side user that describe behaviours value by value: the paired ones, then those beside them."""
    paired = [behavior.name for behavior, _ in paired_fields(fields)]
    return [*paired, *(field.name for field in fields if field.beside in paired and field.name not in paired)]


def check_equal_lists(batch: Batch, behaviors: Sequence[str]) -> None:
    """Raise DataError where a user's lists of these fields are not equally long."""
    first, *others = behaviors
    for name in others:
        one_G, other_G = batch.fields[first].lengths_M, batch.fields[name].lengths_M
        differing = np.flatnonzero(one_G != other_G)
        if len(differing):
            at = differing[0]
            raise DataError(
                f"model.base=din pairs {first} and {name} value by value, but a user has {one_G[at]} of the one "
                f"and {other_G[at]} of the other; write lists of equal length, give one of them another table "
                "in the schema, or set model.base=mlp"
            )


def paired_fields(fields: Collection[Field]) -> list[tuple[Field, Field]]:
    """Pair each multi_id field of side user with the first id field of side ad that has its table."""
    ads: dict[str, Field] = {}
    for field in fields:
        if field.side == "ad" and field.kind == "id":
            ads.setdefault(field.table_name, field)
    return [
        (field, ads[field.table_name])
        for field in fields
        if field.side == "user" and field.kind == "multi_id" and field.table_name in ads
    ]
