"""Arrow tables to the arrays that training makes of sample files: a row is a user and all candidates."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from serving.errors import RequestError
from serving.scoring.columns import RequestColumns
from serving.scoring.decode import Bool, DecodedRequests, batch_of
from trainer.errors import DataError, SchemaError
from trainer.samples.batch import Jagged
from trainer.samples.columns import Rule, check_types, decode_unlabelled
from trainer.schema import Field

_TABLE = "the table"


def decode_table(columns: RequestColumns, table: pa.Table) -> DecodedRequests:
    """Decode and check a table with the columns of sample files, labels left out; null images are missing ones.

    Raises RequestError that names the column and the row.
    """
    columns.check_table(table.column_names)
    nulls: dict[str, Bool] = {}
    try:
        check_types(table.schema, columns.rules, _TABLE)
        for column in sorted(columns.nullable):
            table, is_null_N = _without_nulls(table, column, columns.sources[column])
            if is_null_N is not None:
                nulls[column] = is_null_N
        groups = decode_unlabelled(table, columns.rules, _TABLE)
    except (DataError, SchemaError) as failure:
        raise RequestError(str(failure)) from None
    counts_G = np.diff(groups.sample_offsets)
    rows = {"user": np.arange(len(counts_G)), "ad": np.arange(groups.num_samples)}

    def taken(field: Field, column: str) -> Jagged:
        return Jagged(*groups.columns[column].take(rows[field.side]))

    return DecodedRequests(batch_of(columns, taken, counts_G), counts_G, nulls)


def _without_nulls(table: pa.Table, column: str, rule: Rule) -> tuple[pa.Table, Bool | None]:
    """Replace null keys by 0, and null uris by "": the table, and which values were null."""
    array: Any = table.column(column).combine_chunks()
    lists = []
    for _ in range(rule.depth):
        if array.null_count:  # of a list, which decoding refuses
            return table, None
        lists.append(array)
        array = array.flatten()
    if not array.null_count:
        return table, None
    is_null_N = array.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    is_text = pa.types.is_string(array.type) or pa.types.is_large_string(array.type)
    array = pc.fill_null(array, "" if is_text else 0)
    for outer in reversed(lists):
        ends = np.append(0, np.cumsum(pc.list_value_length(outer).to_numpy(zero_copy_only=False)))
        array = pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), array)
    return table.set_column(table.schema.get_field_index(column), column, array), is_null_N
