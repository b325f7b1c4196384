"""The trainer's schema and settings in the folder of samples that a job made."""

from collections.abc import Mapping
from pathlib import Path

from featurestore.storage.storage import Storage
from trainer.schema.suggest_schema import inspect_samples, render_schema
from trainer.schema.text import SCHEMA_FILE, SETTINGS_FILE, settings_text

LOOKED_AT = 200_000  # groups from which a schema is suggested


def write_suggested(folder: Path, samples: str) -> None:
    """Suggest a schema from the samples in `folder`, which will be at `samples`, and write it there.

    Raises SchemaError.
    """
    schema, made, table = inspect_samples(Storage(folder), "label", "user", LOOKED_AT)
    write_schema(folder, samples, render_schema(schema, made, table, samples), made.tables)


def write_schema(
    folder: Path, samples: str | Path, schema: str, tables: Mapping[str, int], store: str | None = None
) -> None:
    """Write the text of a schema, and settings with the rows of its ID tables, for samples at `samples`."""
    address = Storage(samples).full(SCHEMA_FILE) if "://" in str(samples) else str(Path(samples) / SCHEMA_FILE)
    settings = settings_text(str(samples), address, tables, store)
    for name, text in {SCHEMA_FILE: schema, SETTINGS_FILE: settings}.items():
        (folder / name).write_text(text, encoding="utf-8")


def schema_of_samples(samples: str) -> str | None:
    """Find the schema in a folder of samples, None where there is none."""
    storage = Storage(samples)
    return storage.full(SCHEMA_FILE) if SCHEMA_FILE in storage.list() else None
