"""torchvision, imported without the compiler of torch, which no job uses: a second and a half of each job and worker.

torchvision's operations for boxes ask the compiler one question, and take the function for it as they are imported.
"""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

__all__ = ["create_feature_extractor", "functional", "get_graph_node_names", "models"]

_COMPILER = "torch._dynamo.utils"


class CalledLater(ModuleType):
    """A stand-in for a module: each of its functions imports the module once it is called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            return getattr(importlib.import_module(self.__name__), name)(*arguments)

        return call


if is_new := _COMPILER not in sys.modules:
    sys.modules[_COMPILER] = CalledLater(_COMPILER)
try:
    from torchvision import models
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
    from torchvision.transforms import functional
finally:
    if is_new:
        del sys.modules[_COMPILER]
