"""Types of numbers by their names in files, settings and options. Quick to import: a command's help lists them."""

from typing import Literal

FloatDType = Literal["bfloat16", "float16", "float32"]
DType = Literal[FloatDType, "int8"]
"""In which a store keeps features."""
