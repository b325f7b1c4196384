"""DICM, the Deep Image CTR Model: Embedding&MLP over ID fields, and visual vectors of the ad and the behaviours."""

from torch import Tensor

from trainer.config.options import ModelConfig
from trainer.models.ctr import CtrModel, Dense, Fields
from trainer.models.layers import Mlp
from trainer.schema import Schema


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
