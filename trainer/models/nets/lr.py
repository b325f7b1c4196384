"""Logistic regression: one weight for each id, for each dense value and for each element of the visual vectors."""

import torch
from torch import Tensor, nn

from trainer.config.options import ModelConfig
from trainer.models.ctr import CtrModel, Dense, Fields
from trainer.schema import Schema


class Lr(CtrModel):
    """logit = b + sum of the weights of all ids of the sample + w . (dense values, visual vectors).

    The weight of an id is a row of its table, which is one number wide here, whatever width the schema or the model
    names: a linear layer over 12-wide ID vectors would spend twelve parameters and twelve Adam moments on an id for
    the same one number, and would learn a product of two factors in its place. Visual vectors keep their width, so
    with images a step has a second collective of vectors, of one number an id. Images are E's and the aggregator's, as
    in the other base nets. The weights of a multi_id are pooled as `multi_hot` says. w and b start at zero, the ids'
    weights as all tables do.

    The only network is the attention to images, which learns late from Xavier's large weights: GAUC .628 instead of
    .700 after two epochs of the drawn clothes (docs/RESULTS.md). So it starts as torch's layers do.
    """

    starts_by_xavier = False

    def __init__(self, schema: Schema, config: ModelConfig) -> None:
        super().__init__(schema, config.model_copy(update={"image_products": False}))
        num_ids = sum(field.is_id for field in self.fields)
        self.weight = nn.Parameter(torch.zeros(self.input_width - num_ids))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, fields: Fields, dense: Dense, group_of_sample_B: Tensor) -> Tensor:
        ids_of_ad, dense_of_ad = self.id_vectors("ad", fields), self.dense_values("ad", dense)
        ids = [*self.of_group(self.id_vectors("user", fields), group_of_sample_B), *ids_of_ad]
        others = [
            *self.of_group(self.dense_values("user", dense), group_of_sample_B),
            *dense_of_ad,
            *self.images(fields, dense, group_of_sample_B, [*ids_of_ad, *dense_of_ad]),
        ]
        logit_B = self.bias.expand(group_of_sample_B.shape[0])
        if ids:
            logit_B = logit_B + torch.cat(ids, dim=1).sum(dim=1)
        if others:
            logit_B = logit_B + torch.cat(others, dim=1) @ self.weight
        return logit_B
