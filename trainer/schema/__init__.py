"""Which fields a sample has: the schema that the reader, the exchange and the model share."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.schema.fields import CROSS, DEFAULT_SCHEMA, DEFAULT_STORE, Field, Kind, Schema, Side, load_schema

__all__ = ["CROSS", "DEFAULT_SCHEMA", "DEFAULT_STORE", "Field", "Kind", "Schema", "Side", "load_schema"]


def __getattr__(name: str) -> Any:
    """Load the module of the fields when a name of it is asked for first: `crossmedia schema --help` needs none."""
    if name in __all__:
        return getattr(importlib.import_module("trainer.schema.fields"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
