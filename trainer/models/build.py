"""From the configuration to the model."""

from trainer.models.ctr import CtrModel
from trainer.models.dcn import Dcn
from trainer.models.dicm import Dicm
from trainer.models.din import Din
from trainer.models.lr import Lr
from trainer.models.two_tower import TwoTower
from trainer.options import BaseNet, ModelConfig
from trainer.schema import Schema

_BASE_NETS: dict[BaseNet, type[CtrModel]] = {
    "lr": Lr,
    "mlp": Dicm,
    "din": Din,
    "dcn": Dcn,
    "two_tower": TwoTower,
}


def build_model(schema: Schema, config: ModelConfig) -> CtrModel:
    """The model of `config.base` over the fields of the schema. Raises ConfigError where they do not fit."""
    return _BASE_NETS[config.base](schema, config)
