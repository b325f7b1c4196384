"""Arrow tables to the arrays that training makes of sample files: a row is a user and all candidates."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurestore.keys import NO_IMAGE
from serving.errors import OverflowingInputError, RequestError
from serving.scoring.columns import RequestColumns
from serving.scoring.decode import Bool, DecodedRequests, batch_of
from trainer.errors import DataError, OverflowingValueError, SchemaError
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
    read = dict(groups.columns)
    for column, is_null_N in nulls.items():
        read[column] = replace(read[column], values=np.where(is_null_N, NO_IMAGE, read[column].values))
    counts_G = np.diff(groups.sample_offsets)
    rows = {"user": np.arange(len(counts_G)), "ad": np.arange(groups.num_samples)}

    def taken(field: Field, column: str) -> Jagged:
        return Jagged(*read[column].take(rows[field.side]))

    try:
        batch = batch_of(columns, taken, counts_G)
    except OverflowingValueError as failure:
        row = failure.row
        if columns.rules[failure.column].side == "ad":
            row = int(np.searchsorted(groups.sample_offsets, row, side="right")) - 1
        raise OverflowingInputError(f"{_TABLE}, row {row}: {failure}") from None
    return DecodedRequests(batch, counts_G, nulls)


def scorable_rows(columns: RequestColumns, table: pa.Table) -> pa.Table:
    """Leave out the rows with a number that its field's transform makes infinite: no version can score them."""
    try:
        decode_table(columns, table)
        return table
    except OverflowingInputError:
        return table.filter(pa.array([_is_scorable(columns, table.slice(row, 1)) for row in range(table.num_rows)]))


def _is_scorable(columns: RequestColumns, row: pa.Table) -> bool:
    try:
        decode_table(columns, row)
    except OverflowingInputError:
        return False
    return True


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
