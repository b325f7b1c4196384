"""The type of E's matrix products with model.compute_dtype=auto: the one that the ranks' hardware is quick at."""

import torch

from featurestore.lookup.compute_dtype import AutoDType, dtype_of_environment, dtype_of_machine
from trainer.comm import Comm
from trainer.config.options import ModelConfig
from trainer.errors import ConfigError


def with_compute_dtype(config: ModelConfig, comm: Comm, device: torch.device, recorded: str | None) -> ModelConfig:
    """Settle model.compute_dtype, the same on every rank.

    It is what the setting says; for "auto" it is `recorded` (in the checkpoint that a run continues), else what rank
    0's environment names, else bfloat16 where the hardware of every rank is quick at it, and float32 elsewhere. All
    ranks call it. Raises ConfigError on all where the environment names no such type.
    """
    if config.compute_dtype != "auto":
        return config
    settled = recorded or comm.on_rank_0(_named_dtype) or _agreed_dtype(comm, device)
    return config.model_copy(update={"compute_dtype": settled})


def _named_dtype() -> AutoDType | None:
    try:
        return dtype_of_environment()
    except ValueError as failure:
        raise ConfigError(str(failure)) from failure


def _agreed_dtype(comm: Comm, device: torch.device) -> AutoDType:
    of_ranks = comm.allgather_object(dtype_of_machine(device.type), name="compute dtypes")
    return "bfloat16" if set(of_ranks) == {"bfloat16"} else "float32"
