"""The model of a configuration: its base net, one of ours or a user's own, and how its linear layers start."""

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from trainer.config.options import BaseNet, ModelConfig, OwnNet
from trainer.errors import ConfigError
from trainer.models.ctr import CtrModel
from trainer.models.nets.dcn import Dcn
from trainer.models.nets.dicm import Dicm
from trainer.models.nets.din import Din
from trainer.models.nets.finalmlp import FinalMlp
from trainer.models.nets.lr import Lr
from trainer.models.nets.two_tower import TwoTower
from trainer.schema import Schema

_BASE_NETS: dict[BaseNet | OwnNet, type[CtrModel]] = {
    "lr": Lr,
    "mlp": Dicm,
    "din": Din,
    "dcn": Dcn,
    "finalmlp": FinalMlp,
    "two_tower": TwoTower,
}
_CONTRACT = "docs/CODE.md, A net of your own, has what it needs"


def build_model(schema: Schema, config: ModelConfig) -> CtrModel:
    """Build the model of `config.base` over the fields of the schema. Raises ConfigError where they do not fit."""
    model = net_class(config.base)(schema, config)
    fixed = next((name for name, value in model.named_parameters() if not value.requires_grad), None)
    if fixed is not None:
        raise ConfigError(f"model.base={config.base}: its parameter {fixed} has no gradient; make it a buffer")
    return model.apply(_start_by_xavier) if config.init == "xavier" and model.starts_by_xavier else model


def net_class(base: str) -> type[CtrModel]:
    """Return the class of a base net: one of ours, or the one at a dotted path, whose module is imported.

    Of that module nothing is called but a class that extends CtrModel, as a path may come from another user's run.
    Raises ConfigError.
    """
    if base in _BASE_NETS:
        return _BASE_NETS[base]
    module_name, _, name = base.rpartition(".")
    found = getattr(_imported(base, module_name), name, None)
    if not isinstance(found, type) or not issubclass(found, CtrModel):
        what = "is not a class" if found is not None else f"is not there: {module_name} has no {name}"
        if isinstance(found, type):
            what = "does not extend trainer.models.ctr.CtrModel"
        raise ConfigError(f"model.base={base} {what}; {_CONTRACT}")
    _check_call(base, found, "schema", "config")
    if found.forward is CtrModel.forward:
        raise ConfigError(f"model.base={base} has no forward; {_CONTRACT}")
    _check_call(base, found.forward, "self", "fields", "dense", "group_of_sample_B")
    return found


def check_logits(base: str, logit_B: Tensor, num_samples: int) -> None:
    """Raise ConfigError where a net's answer is not one real number for each sample, (B,): alike on all ranks."""
    if not isinstance(logit_B, Tensor):
        kind = type(logit_B).__name__
        raise ConfigError(f"model.base={base}: its forward returned {kind}, not a tensor; {_CONTRACT}")
    if logit_B.shape != (num_samples,) or not logit_B.is_floating_point():
        kind = str(logit_B.dtype).removeprefix("torch.")
        raise ConfigError(
            f"model.base={base}: its forward returned {tuple(logit_B.shape)} {kind} for {num_samples} samples, "
            f"not a real number for each, (B,); {_CONTRACT}"
        )


def _imported(base: str, module_name: str) -> Any:
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise ConfigError(f"model.base={base} is of Python's own library, which has no nets; {_CONTRACT}")
    try:
        return importlib.import_module(module_name)
    except Exception as failure:  # whatever a module raises while it is imported
        if isinstance(failure, ModuleNotFoundError) and f"{module_name}.".startswith(f"{failure.name}."):
            raise ConfigError(
                f"model.base={base}: there is no module {failure.name}; install the package, or set PYTHONPATH to the "
                "folder that has it, on every host"
            ) from failure
        reason = " ".join(str(failure).split())
        raise ConfigError(
            f"model.base={base}: importing {module_name} fails: {type(failure).__name__}: {reason}"
        ) from failure


def _check_call(base: str, function: Callable[..., Any], *arguments: str) -> None:
    """Raise ConfigError where a function does not take these arguments by position."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as failure:
        name, given = getattr(function, "__name__", base), ", ".join(arguments)
        raise ConfigError(f"model.base={base}: {name}({given}) cannot be called: {failure}; {_CONTRACT}") from failure


def _start_by_xavier(module: nn.Module) -> None:
    """Draw Glorot and Bengio's normal weights, of deviation (2 / (inputs + outputs)) ** 0.5; biases are zero."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
