"""Tables and arrays in and out: pandas, Arrow, numpy and torch."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from featurestore.errors import UserError
from featurestore.keys import keys_of_uris

Scores = Any
"""A pandas DataFrame where one was given, with its index; else an Arrow table."""


class TableError(UserError):
    """A value is not a table or not a column."""


def table_of(data: Any) -> pa.Table:
    """Make an Arrow table of a pandas DataFrame, an Arrow table, or a mapping of columns. Raises TableError."""
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
        raise TableError(f"the table cannot be read: {failure}") from failure
    raise TableError(f"{type(data).__name__} is not a table; give a pandas DataFrame, an Arrow table, or a dict")


def is_pandas(data: Any) -> bool:
    """Return whether data is a DataFrame of pandas, which is not imported for it."""
    return type(data).__module__.partition(".")[0] == "pandas" and hasattr(data, "columns")


def keys_of(images: Any) -> NDArray[np.int64]:
    """Return the keys of images, (U,): they are keys, or uris to hash, in a list or in an array of any library.

    Raises TableError for other values.
    """
    values: Any = np.asarray(images.to_pylist() if hasattr(images, "to_pylist") else images)
    if values.dtype.kind in "iu" or values.size == 0:
        return np.asarray(values, np.int64).reshape(-1)
    texts = values.reshape(-1).tolist()
    if not all(isinstance(text, str) for text in texts):
        raise TableError("images are named by their uris, which are texts, or by their keys, which are whole numbers")
    return keys_of_uris(texts)


def requests_of(data: Any, depths: Mapping[str, int]) -> tuple[pa.Table, bool]:
    """Make the rows that models score: the columns of `depths`, with so many lists around their values.

    A table with an impression in each row, the columns of its ad without the list of ads around them, becomes one with
    lists of one ad. Returns whether it was such a table. Columns that no model reads are left out.
    """
    table = table_of(data)
    table = table.select([name for name in table.column_names if name in depths])
    flat = [name for name in table.column_names if _depth(table.schema.field(name).type) == depths[name] - 1]
    offsets = pa.array(np.arange(table.num_rows + 1), pa.int32())
    for name in flat:
        place, column = table.column_names.index(name), table.column(name).combine_chunks()
        table = table.set_column(place, name, pa.ListArray.from_arrays(offsets, column))
    return table, bool(flat)


def scores_of(data: Any, logits: Sequence[NDArray[Any]]) -> Scores:
    """Make a table of the logits and click probabilities of each row's ads, as a DataFrame where `data` is one."""
    logit_B = np.concatenate([np.empty(0, np.float32), *logits]).astype(np.float32)
    probability_B = (1 / (1 + np.exp(-np.maximum(logit_B.astype(np.float64), -700)))).astype(np.float32)
    columns = {"logit": logit_B, "probability": probability_B}
    if not is_pandas(data):
        return pa.table({name: pa.array(values) for name, values in columns.items()})
    import pandas as pd

    return pd.DataFrame(columns, index=data.index.repeat([len(each) for each in logits]))


def with_behaviors(impressions: Any, behaviors: Any, samples: str = "data/samples") -> Any:
    """Make rows to score of a raw log: impressions, each with the user's behaviours before it, in their order.

    Both are tables as the logs that `samples` were made from: windows, limits and mapping are theirs. Raises
    SampleError for a row that a job would quarantine.
    """
    from pipeline.samples.requests import requests_of_log

    rows = requests_of_log(table_of(impressions), table_of(behaviors), str(samples))
    return rows.to_pandas().set_index(impressions.index) if is_pandas(impressions) else rows


def as_html(title: str, values: Mapping[str, object]) -> str:
    """Write names and values as a table for a notebook."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in values.items())
    return f"<table><caption>{escape(title)}</caption>{rows}</table>"


def _column(values: Any) -> Any:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    found = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values) if _is_array(values) else values
    return pa.array(list(found) if isinstance(found, np.ndarray) and found.ndim > 1 else found)


def _is_array(values: Any) -> bool:
    return hasattr(values, "__array__")


def _depth(kind: pa.DataType) -> int:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return 1 + _depth(kind.value_type) if is_list else 0
