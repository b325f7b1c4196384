"""The type of E's matrix products with model.compute_dtype=auto: the one that this machine is quicker at."""

import time

import torch

from featurestore.lookup.compute_dtype import AutoDType, dtype_of_environment
from trainer.comm import Comm
from trainer.config.options import ModelConfig
from trainer.errors import ConfigError

_ROWS, _FEATURE, _HIDDEN, _TURNS = 1024, 4096, 256, 4


def with_compute_dtype(config: ModelConfig, comm: Comm, device: torch.device, recorded: str | None) -> ModelConfig:
    """Settle model.compute_dtype, the same on every rank.

    It is what the setting says; for "auto" it is `recorded` (in the checkpoint that a run continues), else what rank
    0's environment names, else what rank 0 is quicker at. All ranks call it. Raises ConfigError on all where the
    environment names no such type.
    """
    if config.compute_dtype != "auto":
        return config
    settled = recorded or comm.on_rank_0(lambda: _named_dtype() or faster_dtype(device))
    return config.model_copy(update={"compute_dtype": settled})


def _named_dtype() -> AutoDType | None:
    try:
        return dtype_of_environment()
    except ValueError as failure:
        raise ConfigError(str(failure)) from failure


def faster_dtype(device: torch.device) -> AutoDType:
    """Choose bfloat16 on a GPU that has it, and on a processor that is quicker at it.

    A processor is tried, for a fifth of a second, at E's first product of features as they lie in the store: not every
    one that knows bfloat16 is so quick at it that it pays to leave float32.
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if product_s(torch.bfloat16) <= product_s(torch.float32) else "float32"


@torch.inference_mode()
def product_s(dtype: torch.dtype) -> float:
    """Time the first product of E, forward and as in backward; the fastest of some turns."""
    stored_QD = torch.ones(_ROWS, _FEATURE, dtype=torch.bfloat16)
    rows_QD, weight_HD = torch.empty_like(stored_QD, dtype=dtype), torch.ones(_HIDDEN, _FEATURE, dtype=dtype)
    seconds = []
    for _ in range(_TURNS):
        start_s = time.perf_counter()
        hidden_QH = rows_QD.copy_(stored_QD) @ weight_HD.t()
        hidden_QH.t() @ rows_QD
        seconds.append(time.perf_counter() - start_s)
    return min(seconds)
