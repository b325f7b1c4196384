"""Bundles: a trained run as immutable, numbered versions on a disk or object store, and which one is in use."""

from typing import Literal

MODELS = "data/models/ctr"
"""Where a model is published unless another place is named."""
EPS = 1e-3
"""Vectors that moved less are not published."""
SAMPLE_GROUPS = 64
"""Groups of test samples in a bundle."""
RowDType = Literal["float32", "float16", "int8"]
"""In which a bundle has the rows of IDs."""
