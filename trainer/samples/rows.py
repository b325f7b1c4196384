"""Rows to score, as they come from other programs.

Tables of pandas, Arrow, numpy or torch, with an impression in each row, or a group, and without labels.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.errors import DataError
from trainer.samples.columns import rules_of, source_columns
from trainer.schema import Schema


def table_of(data: Any) -> pa.Table:
    """Make an Arrow table of a DataFrame of pandas, an Arrow table, or a mapping of columns. Raises DataError."""
    if isinstance(data, pa.Table):
        return data
    try:
        if isinstance(data, pa.RecordBatch):
            return pa.Table.from_batches([data])
        if is_pandas(data):
            return pa.Table.from_pandas(data, preserve_index=False).replace_schema_metadata(None)
        if isinstance(data, Mapping):
            return pa.table({str(name): _column(values) for name, values in data.items()})
    except (pa.ArrowException, ValueError, TypeError) as failure:
        raise DataError(f"the table cannot be read: {failure}") from failure
    raise DataError(f"{type(data).__name__} is not a table; give a DataFrame of pandas, an Arrow table, or a dict")


def is_pandas(data: Any) -> bool:
    """Return whether data is a DataFrame of pandas, which is not imported for it."""
    return type(data).__module__.partition(".")[0] == "pandas" and hasattr(data, "columns")


def _column(values: Any) -> Any:
    """Make a column of a list or of an array of any library; rows of a matrix become lists."""
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    if hasattr(values, "__array__"):
        values = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
        return pa.array(list(values) if values.ndim > 1 else values)
    return pa.array(values)


def groups_of_rows(table: pa.Table, depths: Mapping[str, int]) -> pa.Table:
    """Make groups of rows: the columns of `depths`, with so many lists around their values; others are left out.

    Of a table with an impression in each row, the columns of its ad lack the list of ads: they get lists of one.
    """
    table = table.select([name for name in table.column_names if name in depths])
    table = table.cast(pa.schema([pa.field(each.name, _known(each.type)) for each in table.schema]))
    offsets = pa.array(np.arange(table.num_rows + 1), pa.int32())
    for place, field in enumerate(table.schema):
        if _depth(field.type) == depths[field.name] - 1:
            column = table.column(place).combine_chunks()
            table = table.set_column(place, field.name, pa.ListArray.from_arrays(offsets, column))
    return table


def sample_groups(table: pa.Table, schema: Schema) -> pa.Table:
    """Make sample groups of rows, see `groups_of_rows`; their labels are zeros. Raises DataError without an ad."""
    rules = {name: rule for name, rule in source_columns(rules_of(schema)).items() if name != schema.label}
    groups = groups_of_rows(table, {name: rule.depth for name, rule in rules.items()})
    of_ads = next((name for name in groups.column_names if rules[name].side == "ad"), None)
    if of_ads is None:
        raise DataError(f"the rows have no column of an ad, as {schema.new_ad_column}")
    lengths_G = groups.column(of_ads).combine_chunks().value_lengths().to_numpy(zero_copy_only=False)  # type: ignore[attr-defined]
    offsets = np.concatenate([[0], np.cumsum(lengths_G)])
    labels = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(np.zeros(offsets[-1], np.int8)))
    return groups.append_column(schema.label, labels)


def _known(kind: Any) -> pa.DataType:
    """Return a column's type; of one without a value, such as empty lists alone, it is that of IDs."""
    if _depth(kind):
        return pa.list_(_known(kind.value_type))
    return pa.int64() if pa.types.is_null(kind) else kind


def _depth(kind: Any) -> int:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return 1 + _depth(kind.value_type) if is_list else 0
