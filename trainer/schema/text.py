"""A schema, and the settings of a run that fit it, as YAML that a person can edit further."""

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from trainer.schema.fields import Schema

SCHEMA_FILE, SETTINGS_FILE = "schema.yaml", "settings.yaml"
"""Written next to samples, for trainer.main --config SAMPLES/settings.yaml."""
IMAGES_FILE = "images.parquet"
"""Next to samples: key and uri of each image that the logs name, in 256 row groups by the top bits of the key."""

SMALLEST_TABLE = 256
ROWS_PER_ID = 4  # at least: IDs are hashed to rows, and of n IDs in 4 n rows 22 % share theirs with another
_ENDLESS = 1 << 30  # a field stays on its line


def table_rows(num_distinct: int) -> int:
    """Choose the rows of an ID table for `num_distinct` IDs: a power of two, at least `ROWS_PER_ID` for each."""
    return max(SMALLEST_TABLE, 1 << (ROWS_PER_ID * max(1, num_distinct) - 1).bit_length())


def schema_text(schema: Schema, header: Iterable[str] = (), comments: Mapping[str, str] | None = None) -> str:
    """Write the schema as YAML, one field a line; `load_schema` reads an equal one.

    `header` is lines of comment at the top, `comments` one for each field by its name.
    """
    notes = comments or {}
    roles = {"label": schema.label, "group": schema.group, "new_ad_field": schema.new_ad_field}
    lines = [*(f"# {line}".rstrip() for line in header), "", *(_one_line({role: roles[role]}) for role in roles), ""]
    lines.append("fields:")
    for field in schema.fields:
        written = _flow(field.model_dump(exclude_defaults=True))
        lines.append(f"  - {written}" + (f"  # {notes[field.name]}" if field.name in notes else ""))
    return "\n".join(lines).lstrip("\n") + "\n"


def settings_text(samples: str, schema_file: str, tables: Mapping[str, int], store: str | None = None) -> str:
    """Write settings for `python -m trainer.main --config`: where samples and schema are, and rows of each ID table."""
    data = {"samples": samples, "schema_file": schema_file} | ({"store": store} if store else {})
    lines = ["# Over the default preset: python -m trainer.main --config THIS_FILE", "", "data:"]
    lines += [f"  {_one_line({name: value})}" for name, value in data.items()]
    lines += [
        "",
        "model:",
        "  tables:  # rows; IDs are hashed into them",
        *(f"    {_one_line({k: tables[k]})}" for k in tables),
    ]
    return "\n".join(lines) + "\n"


def _one_line(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), width=_ENDLESS, allow_unicode=True).strip()


def _flow(values: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(dict(values), default_flow_style=True, sort_keys=False, width=_ENDLESS, allow_unicode=True)
    return text.strip()
