"""An export of sample groups as XDL's text samples, one line an impression."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.errors import StorageError
from featurestore.published import open_published
from featurestore.storage.storage import Storage
from pipeline.errors import SampleError, SampleOptionError
from pipeline.xdl.line import WEIGHT_SUFFIX, Part, XdlLine, format_ids, format_line, format_number
from trainer.schema import Field, Schema

_RESERVED_IN_NAMES = "|;@,:"

Columns = list[tuple[str, Field, str]]
"""A column's name, the first field that reads it, and the column with the weights of its ids, where there is one."""


def export_samples(samples: str, target: str, schema: Schema, splits: Iterable[str]) -> int:
    """Write the groups of `samples`/SPLIT/*.parquet as lines of the file `target`; return the number of lines.

    Keys and times are those that an import kept (`skey`, `gkey`, `ad_timestamp`), else made of the group's value and
    `timestamp`; weights are those of the schema's columns for them, or of the `_weight` columns, else 1. Raises
    SampleError, StorageError.
    """
    columns = _columns(schema)
    if wrong := [name for name, _, _ in columns if set(name) & set(_RESERVED_IN_NAMES)]:
        raise SampleError(f"column {wrong[0]}: XDL's text has no way to write a name with one of {_RESERVED_IN_NAMES}")
    storage, path = Storage(str(PurePosixPath(target).parent)), PurePosixPath(target).name
    if "://" in target:
        parent, _, path = target.rpartition("/")
        storage = Storage(parent)
    num_lines = 0
    with storage.open_output(path) as file:
        for group in _groups(samples, splits, schema, columns):
            for line in _lines(group, schema, columns, num_lines):
                file.write(f"{format_line(line)}\n".encode())
                num_lines += 1
        if not num_lines:
            raise SampleOptionError(f"{samples}: no sample group in {', '.join(splits)}")
    return num_lines


def _columns(schema: Schema) -> Columns:
    weights = {field.column_name: field.weights for field in schema.fields if field.weights}
    first: dict[str, Field] = {}
    for field in schema.fields:
        first.setdefault(field.column_name, field)
    return [(name, field, weights.get(name, name + WEIGHT_SUFFIX)) for name, field in first.items()]


def _lines(group: Mapping[str, Any], schema: Schema, columns: Columns, first: int) -> Iterator[XdlLine]:
    """Make the lines of one row of the samples; `first` numbers those that have no key of their own."""
    gkey, labels = str(group.get("gkey", group[schema.group])), group[schema.label]
    user = _part(group, columns, "user", None)
    times = group.get("ad_timestamp") or [group.get("timestamp") or 0] * len(labels)
    for index, label in enumerate(labels):
        skey = group["skey"][index] if "skey" in group else f"sample{first + index}"
        yield XdlLine(skey, gkey, user, _part(group, columns, "ad", index), [str(label)], str(times[index]))


def _part(group: Mapping[str, Any], columns: Columns, side: str, index: int | None) -> Part:
    part: Part = {}
    for name, field, weights_name in columns:
        if field.side != side:
            continue
        value, weights = group[name], group.get(weights_name)
        if index is not None:
            value, weights = value[index], weights[index] if weights is not None else None
        values = value if isinstance(value, list) else [value]
        if field.kind == "dense":
            part[name] = [format_number(number) for number in values]
        else:
            part[name] = format_ids(values, weights if isinstance(weights, list) or weights is None else [weights])
    return part


def _groups(samples: str, splits: Iterable[str], schema: Schema, columns: Columns) -> Iterator[dict[str, Any]]:
    storage = open_published(samples)
    needed = {schema.group, schema.label, *(name for name, _, _ in columns)}
    optional = {"gkey", "skey", "timestamp", "ad_timestamp", *(weights for _, _, weights in columns)}
    for split in splits:
        for name in storage.list(split):
            if not name.endswith(".parquet"):
                continue
            where = storage.full(f"{split}/{name}")
            try:
                with closing(pq.ParquetFile(storage.open_input(f"{split}/{name}"))) as file:
                    found = set(file.schema_arrow.names)
                    if missing := sorted(needed - found):
                        raise SampleError(
                            f"{where}: column {missing[0]!r} is missing; is it the schema of these samples?"
                        )
                    for batch in file.iter_batches(1024, columns=sorted(needed | (optional & found))):
                        yield from batch.to_pylist()
            except (pa.ArrowException, OSError, StorageError) as error:
                raise SampleError(f"{where}: cannot be read: {error}") from error
