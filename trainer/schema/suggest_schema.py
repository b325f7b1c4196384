"""A first schema of sample groups, suggested by what is in their columns."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from featurestore.storage.storage import Storage
from trainer.errors import SchemaError
from trainer.schema.fields import Field, GalleryPooling, Kind, Schema, Side
from trainer.schema.numbers import LOG2
from trainer.schema.profile import Column, Content, TableProfile, data_files, look
from trainer.schema.text import schema_text, table_rows

IMAGE_NAME = re.compile(r"(^|_)(image|img|picture|pic|photo|cover)s?($|_)", re.IGNORECASE)
NO_FIELDS = re.compile(r"(^|_)(session|timestamp|time|ts|day|date|skey|gkey)$", re.IGNORECASE)
CONTEXT_NAME = re.compile(r"(^|_)(scene|slot|position|placement|pid|page|hour)($|_)", re.IGNORECASE)
WEIGHT_SUFFIX = "_weight"
LONG_TAIL = 100
AGES = "behavior_age"
USER_PREFIXES, AD_PREFIX = ("behavior_", "user_"), "ad_"


@dataclass
class Suggestion:
    """Fields with a comment each, rows of their tables, and why other columns are left out."""

    fields: list[Field] = dataclasses.field(default_factory=list)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    ids_of_table: dict[str, int] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def tables(self) -> dict[str, int]:
        """Rows of each ID table."""
        return {name: table_rows(count) for name, count in self.ids_of_table.items()}


def sample_files(storage: Storage) -> list[str]:
    """List Parquet files of samples below a folder: those of train/ and test/, or all."""
    files = [path for path in data_files(storage) if path.endswith(".parquet")]
    split = [path for path in files if path.startswith(("train/", "test/"))]
    return split or files


def inspect_samples(
    storage: Storage, label: str, group: str, most_rows: int
) -> tuple[Schema, Suggestion, TableProfile]:
    """Suggest a schema that fits sample files from at most `most_rows` groups. Raises SchemaError, DataError."""
    table = look(storage, sample_files(storage), label, most_rows)
    roles: tuple[tuple[str, int, str, tuple[Content, ...]], ...] = (
        (label, 1, "a list of 0 and 1 in each group", ("integer",)),
        (group, 0, "one whole number or text a group", ("integer", "text")),
    )
    for name, depth, what, contents in roles:
        column = table.columns.get(name)
        if column is None or column.depth != depth or column.content not in contents:
            found = f"is {column.type}" if column else f"is not among {', '.join(table.columns)}"
            raise SchemaError(
                f"{storage.url}: column {name} {found}; it has to be {what} (--label and --group name them)"
            )
    suggestion = suggest(table, label)
    ad_ids = [each.name for each in suggestion.fields if each.side == "ad" and each.kind == "id"]
    if not ad_ids:
        raise SchemaError(f"{storage.url}: no column has one id for each impression, by which new ads are known")
    new_ad = next((name for name in ("ad_item", "ad", "ad_id") if name in ad_ids), ad_ids[0])
    return Schema(fields=tuple(suggestion.fields), label=label, group=group, new_ad_field=new_ad), suggestion, table


def suggest(table: TableProfile, label: str) -> Suggestion:
    """Suggest fields of every column that a field can read."""
    made = Suggestion()
    for column in table.columns.values():
        ids = table.columns.get(column.name.removesuffix(WEIGHT_SUFFIX))
        if column.name == label or (ids is not None and _weights_of(ids, table) == column.name):
            continue
        reason = _unfit(column)
        if reason is None:
            side = side_of(column)
            kind, width, reason = _kind(column, side)
        if reason is not None:
            made.left_out[column.name] = reason
            continue
        if kind == "dense":
            made_of = {"width": width, "transform": _transform(column), "fill": "mean" if column.missing else None}
            _add(made, column, Field.model_validate({"name": column.name, "side": side, "kind": kind} | made_of))
        else:
            _add_ids(made, table, column, side, kind)
    return made


def render_schema(schema: Schema, made: Suggestion, table: TableProfile, where: str) -> str:
    """Write the schema as YAML with comments: what was found, and what is left out."""
    header = [
        f"First schema of {where}: look through it, then continue with python -m trainer.schema check.",
        f"Suggested from {'all' if table.complete else 'the first'} {table.rows:,} sample groups.",
        "side: user (once a group) | ad (one entry an impression). kind: id | multi_id | dense | content (image keys).",
        "Rows of the ID tables, for model.tables of the settings:",
        *(f"  {name}: {rows}" for name, rows in made.tables.items()),
    ]
    if made.left_out:
        header += ["Left out:", *(f"  {name}: {reason}" for name, reason in made.left_out.items())]
    return schema_text(schema, header, made.notes)


def side_of(column: Column) -> Side:
    """Find the side by the name's beginning, else by whether its lists are as long as the labels'."""
    if column.name.startswith(USER_PREFIXES):
        return "user"
    if column.name.startswith(AD_PREFIX) and column.like_label and column.depth:
        return "ad"
    return "ad" if column.depth and column.like_label else "user"


def column_note(column: Column) -> str:
    """Describe type, different values, nulls and lengths, in a few words."""
    about = "" if column.distinct.is_exact else "about "
    parts = [column.type, f"{about}{column.distinct.estimate:,} different"]
    if column.nulls:
        parts.append(f"{column.nulls:,} of {column.rows:,} null")
    if column.content == "real" and column.smallest is not None:
        parts.append(f"{column.smallest:g} to {column.largest:g}")
    if column.depth and column.shortest is not None:
        parts.append(f"lists of {column.shortest} to {column.longest}")
    if column.example is not None:
        parts.append(f"as {column.example[:40]!r}")
    return ", ".join(parts)


def _unfit(column: Column) -> str | None:
    if NO_FIELDS.search(column.name):
        return f"{column.type}, kept for people; add it by hand if the model should see it"
    if column.content not in ("integer", "real", "text"):
        return f"{column.type}; a field reads numbers and texts"
    if column.nulls and not (column.content == "real" and not column.depth):
        return f"{column.nulls:,} of {column.rows:,} rows are null; a field has none"
    if column.rows > 1 and column.distinct.estimate < 2 and column.content != "real":
        return "one value in all rows" if column.values else "no value in any row"
    return None


def _kind(column: Column, side: Side) -> tuple[Kind, int | None, str | None]:
    """Kind, width of a dense one, and why no field can read the column."""
    inner = column.depth - (side == "ad")
    if _is_gallery(column):
        return "content", None, None
    if inner not in (0, 1):
        return "id", None, f"{column.type} is nested too deep for side {side}"
    if column.content != "real":
        return ("multi_id" if inner else "id"), None, None
    if not inner:
        return "dense", None, None
    if not column.fixed_width:
        return "dense", None, f"{column.type} of {column.shortest} to {column.longest} numbers; dense needs one width"
    return "dense", column.fixed_width if column.fixed_width > 1 else 1, None


def _add(made: Suggestion, column: Column, new: Field) -> None:
    made.fields.append(new)
    made.notes[new.name] = column_note(column)


def _add_ids(made: Suggestion, table: TableProfile, column: Column, side: Side, kind: Kind) -> None:
    """An ID field; of images their content too."""
    name = column.name
    images = _has_images(column) and kind in ("content", "id" if side == "ad" else "multi_id")
    if images:
        gallery: GalleryPooling | None = "mean" if kind == "content" else None
        made.fields.append(Field(name=name, side=side, kind="content", store="images", gallery=gallery))
        if gallery and side == "user":  # no kind of ID field has two levels of lists there
            made.notes[name] = column_note(column)
            return
    kind = "multi_id" if kind == "content" else kind
    values: dict[str, Any] = {"side": side, "kind": kind, "table": _table_name(name, table)}
    values["weights"] = _weights_of(column, table)
    if name == AGES and kind == "multi_id":
        items = [each for each in made.fields if each.name == "behavior_item" and each.kind == "multi_id"]
        values |= {"table": None, "buckets": LOG2, "beside": items[0].name if items else None}
        _add(made, column, Field(name=name, **values))
        return
    if images:
        values |= {"column": name, "name": f"{name}_id"}
    elif side == "ad" and CONTEXT_NAME.search(name):
        values["context"] = True
    _add(made, column, Field(**{"name": name} | values))
    count = made.ids_of_table.get(values["table"], 0)
    made.ids_of_table[values["table"]] = max(count, column.distinct.estimate)


def _transform(column: Column) -> str | None:
    """How such numbers are best scaled, by their range: what is never negative and grows large has a long tail."""
    if column.smallest is None or column.largest is None or -1 <= column.smallest <= column.largest <= 1:
        return None
    return "log_standardize" if column.smallest >= 0 and column.largest >= LONG_TAIL else "standardize"


def _has_images(column: Column) -> bool:
    return IMAGE_NAME.search(column.name) is not None and "_sid" not in column.name and column.content != "real"


def _is_gallery(column: Column) -> bool:
    """Whether each ad or behaviour has a list of images."""
    return _has_images(column) and column.depth == 2


def _weights_of(column: Column, table: TableProfile) -> str | None:
    """The column of weights of these ids, where there is one: called as they are, and of real numbers."""
    weights = table.columns.get(f"{column.name}{WEIGHT_SUFFIX}")
    if weights is None or column.content == "real" or weights.content != "real" or weights.nulls or weights.missing:
        return None
    return weights.name if weights.depth == column.depth else None


def _table_name(name: str, table: TableProfile) -> str:
    """ad_x and behavior_x share table x."""
    for prefix, other in ((AD_PREFIX, "behavior_"), ("behavior_", AD_PREFIX)):
        if name.startswith(prefix):
            base = name.removeprefix(prefix)
            return base if other + base in table.columns or base == "scene" else name
    return name
