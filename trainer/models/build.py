"""The model of a configuration: its base net, and how its linear layers start."""

from torch import nn

from trainer.config.options import BaseNet, ModelConfig
from trainer.models.ctr import CtrModel
from trainer.models.nets.dcn import Dcn
from trainer.models.nets.dicm import Dicm
from trainer.models.nets.din import Din
from trainer.models.nets.finalmlp import FinalMlp
from trainer.models.nets.lr import Lr
from trainer.models.nets.two_tower import TwoTower
from trainer.schema import Schema

_BASE_NETS: dict[BaseNet, type[CtrModel]] = {
    "lr": Lr,
    "mlp": Dicm,
    "din": Din,
    "dcn": Dcn,
    "finalmlp": FinalMlp,
    "two_tower": TwoTower,
}


def build_model(schema: Schema, config: ModelConfig) -> CtrModel:
    """Build the model of `config.base` over the fields of the schema. Raises ConfigError where they do not fit."""
    model = _BASE_NETS[config.base](schema, config)
    return model.apply(_start_by_xavier) if config.init == "xavier" and model.starts_by_xavier else model


def _start_by_xavier(module: nn.Module) -> None:
    """Draw Glorot and Bengio's normal weights, of deviation (2 / (inputs + outputs)) ** 0.5; biases are zero."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
