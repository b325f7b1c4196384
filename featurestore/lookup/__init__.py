"""Reading features fast: one rank's partition of a snapshot, mapped into memory, and the service that embeds keys.

Here is the type for `compute_dtype=auto`: from the environment, else a fast type of the processor or GPU.
"""

import os
from collections.abc import Mapping
from typing import Any, Literal, get_args

from featurestore.problems import Problem

VARIABLE = "CROSSMEDIA_COMPUTE_DTYPE"
AutoDType = Literal["bfloat16", "float32"]
ComputeDType = Literal[AutoDType, "float64"]


def dtype_of_environment() -> AutoDType | None:
    """Return the type that CROSSMEDIA_COMPUTE_DTYPE names, or None if it is not set.

    Raises ValueError where it names something else.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return None
    for dtype in get_args(AutoDType):
        if named == dtype:
            return dtype  # type: ignore[no-any-return]
    raise ValueError(Problem.UNKNOWN_DTYPE.of(VARIABLE, named, " nor ".join(get_args(AutoDType))))


def dtype_of_machine(device_type: str | None = None) -> AutoDType:
    """Return the type that this machine's "cpu" or "cuda" is quick at; by default of the GPU where there is one.

    Asks for capabilities and measures nothing: the same in every process of a machine, whatever else runs there.
    """
    import torch  # here: jobs that only start others' work do without it, which saves seconds

    if device_type == "cuda" or (device_type is None and torch.cuda.is_available()):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return dtype_of_processor(torch.cpu.get_capabilities())


def dtype_of_processor(capabilities: Mapping[str, Any]) -> AutoDType:
    """Return bfloat16 for a processor, by torch's list of its capabilities, that is known to be quicker at it.

    Matrix units (amx_bf16) are five times as fast in bfloat16, and AMD's avx512_bf16 (Zen 4) is twice as fast. Intel's
    avx512_bf16 without matrix units is half as fast as float32. Arm's bf16 was not measured.
    """
    is_amd = str(capabilities.get("cpu_name", "")).startswith("AMD")
    is_quick = capabilities.get("amx_bf16") or (is_amd and capabilities.get("avx512_bf16"))
    return "bfloat16" if is_quick else "float32"
