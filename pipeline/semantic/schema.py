"""The trainer's schema of samples with semantic IDs: which columns have images, and the codes as ID fields."""

from pathlib import Path
from typing import Any

from featurestore.storage.storage import Storage
from featurestore.text import parse_yaml
from pipeline.errors import SampleError, SampleOptionError
from pipeline.samples.schema import write_schema
from pipeline.semantic.samples import code_columns
from trainer.schema import Field, Schema
from trainer.schema.text import SETTINGS_FILE, schema_text, table_rows


def image_columns(schema: Schema, store_name: str) -> dict[str, Field]:
    """Find the first content field of one store for each column. Raises SampleOptionError where there is none."""
    fields = list(schema.of_kind("content"))
    columns: dict[str, Field] = {}
    for field in fields:
        if field.store_name == store_name:
            columns.setdefault(field.column_name, field)
    if not columns:
        known = ", ".join(sorted({field.store_name for field in fields})) or "none"
        raise SampleOptionError(
            f"the schema has no content field of store {store_name}; its stores: {known} (--store-name)"
        )
    return columns


def write_code_schema(
    folder: Path, target: str, samples: Storage, schema: Schema, store_name: str, summary: dict[str, Any]
) -> None:
    """Write the schema with the codes as ID fields, and settings with their tables, for samples at `target`."""
    fields, tables = list(schema.fields), _tables_of(samples)
    levels = summary["levels"]
    for field in image_columns(schema, store_name).values():
        for name, (what, number) in code_columns(field.column_name, len(levels)).items():
            table = f"{store_name}_sid{number}" if what == "level" else f"{store_name}_sid_prefix{number}"
            used = levels[number]["used"] if what == "level" else levels[number - 1]["distinct_prefixes"]
            tables[table] = table_rows(used + 1)
            kind: Any = "id" if field.side == "ad" else "multi_id"
            fields.append(Field(name=name, side=field.side, kind=kind, table=table))
    header = [
        "Fields of the samples, and the codes of their images: _sid0 is the first code, _sid_prefix2 the first two.",
        f"Codebook {summary['codebook']['sha256'][:16]}; -1 is an image without a code.",
    ]
    made = schema.model_copy(update={"fields": tuple(fields)})
    write_schema(folder, target, schema_text(made, header), tables, summary["source"].get("store"))


def _tables_of(samples: Storage) -> dict[str, int]:
    """Read the tables of the settings that are with the samples already."""
    try:
        return dict(parse_yaml(samples.read_bytes(SETTINGS_FILE).decode())["model"]["tables"])
    except FileNotFoundError:
        return {}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise SampleError(f"{samples.full(SETTINGS_FILE)} has no model.tables: {error}") from error
