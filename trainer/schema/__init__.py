"""Which fields a sample has: the schema that the reader, the exchange and the model share."""

from trainer.schema.fields import DEFAULT_SCHEMA, DEFAULT_STORE, Field, Kind, Schema, Side, load_schema

__all__ = ["DEFAULT_SCHEMA", "DEFAULT_STORE", "Field", "Kind", "Schema", "Side", "load_schema"]
