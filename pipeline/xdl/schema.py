"""The trainer's schema of XDL's text samples, written with imported samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.samples.schema import write_schema
from pipeline.xdl.fields import WEIGHT_SUFFIX, XdlField
from trainer.schema import Field, Schema
from trainer.schema.text import schema_text, table_rows

HEADER = ("Fields of XDL's text samples, as they were found.", "kind: id | multi_id | dense | content (image keys).")


def write_field_schema(folder: Path, samples: str, fields: Sequence[XdlField], keep_weights: bool) -> None:
    """Write schema and settings for imported fields; an image field gives its content, and its ids as an ID field."""
    made: list[Field] = []
    tables: dict[str, int] = {}
    notes: dict[str, str] = {}
    for each in fields:
        side: dict[str, Any] = {"side": each.part, "column": None}
        weights = f"{each.column}{WEIGHT_SUFFIX}" if each.is_weighted and keep_weights else None
        if each.kind == "dense":
            made.append(Field(name=each.column, kind="dense", width=each.width if each.width > 1 else None, **side))
            continue
        if each.kind == "content":
            made.append(Field(name=each.column, kind="content", store="images", **side))
            kind: Literal["id", "multi_id"] = "id" if each.part == "ad" else "multi_id"
            ids = {"name": f"{each.column}_id", "table": "image", "column": each.column}
            id_field = Field(**side | ids, kind=kind, weights=weights)
            tables["image"] = max(tables.get("image", 0), table_rows(each.num_ids))
        else:
            id_field = Field(name=each.column, kind=each.kind, weights=weights, **side)
            tables[each.column] = table_rows(each.num_ids)
        made.append(id_field)
        notes[id_field.name] = f"about {each.num_ids:,} ids, {each.max_ids} a line at most"
    new_ad = next(field.name for field in made if field.side == "ad" and field.kind == "id")
    schema = Schema(fields=tuple(made), new_ad_field=new_ad)
    write_schema(folder, samples, schema_text(schema, HEADER, notes), tables)
