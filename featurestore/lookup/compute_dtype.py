"""The type that `compute_dtype=auto` means where the environment names one, e.g. on machines of several kinds."""

import os
from typing import Literal, get_args

VARIABLE = "CROSSMEDIA_COMPUTE_DTYPE"
AutoDType = Literal["bfloat16", "float32"]
ComputeDType = Literal[AutoDType, "float64"]


def dtype_of_environment() -> AutoDType | None:
    """Return the type that CROSSMEDIA_COMPUTE_DTYPE names; None where it is not set, and each machine is to be tried.

    Raises ValueError where it names something else.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return None
    for dtype in get_args(AutoDType):
        if named == dtype:
            return dtype  # type: ignore[no-any-return]
    raise ValueError(f"{VARIABLE}={named} is neither {' nor '.join(get_args(AutoDType))}; correct it, or unset it")
