"""Which fields a sample has: the schema that the reader, the exchange and the model share."""

from trainer.schema.fields import CROSS, DEFAULT_SCHEMA, DEFAULT_STORE, Field, Kind, Schema, Side, load_schema

__all__ = ["CROSS", "DEFAULT_SCHEMA", "DEFAULT_STORE", "Field", "Kind", "Schema", "Side", "load_schema"]
