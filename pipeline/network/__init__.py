"""The frozen network that makes features of images; what a job asks of it without torch is here."""

import re
from pathlib import Path
from typing import Literal

from featurestore.lookup import AutoDType
from featurestore.spec import Int8Spec
from pipeline.errors import WeightsError
from pipeline.problems import Problem

DEFAULT_BACKBONE = "vgg16:classifier.1"  # fc6 after its ReLU

PrecisionName = Literal[AutoDType, "int8"]
Precision = str | Int8Spec
"""Type that a network multiplies in: float32, bfloat16, or int8 with its calibration."""


def check_weights_name(weights: str) -> str:
    """Return `weights`, a path made absolute for worker processes. Raises WeightsError on a malformed name."""
    if weights == "imagenet" or re.fullmatch(r"imagenet:\w+|random:\d{1,18}", weights):
        return weights
    if weights.startswith("random"):
        raise WeightsError(Problem.WRONG_SEED, weights)
    path = Path(weights).absolute()
    if not path.is_file():
        raise WeightsError(Problem.NO_SUCH_WEIGHTS, weights, path)
    return str(path)
