"""Arrow tables to the arrays that training makes of sample files: a row is a user and all candidates.

Texts are first hashed to IDs, each distinct one once, in chunks between which an event loop may do other work.
Dictionaries of long texts are never expanded to rows.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurestore.keys import NO_IMAGE, ids_of_texts, keys_of_uris
from featurestore.text import one_line
from serving.errors import OverflowingInputError, RequestError
from serving.network import CHUNK, Steps, run_steps
from serving.scoring.decode import CROSSED_CHUNK, Bool, DecodedRequests, batch_of
from serving.scoring.request import RequestColumns
from trainer.errors import DataError, OverflowingValueError, SchemaError
from trainer.samples.columns import (
    Encoded,
    Index,
    Rule,
    check_types,
    cross,
    decode_unlabelled,
    encode_numbers,
    is_text,
    unwrapped,
)
from trainer.samples.reader import Jagged
from trainer.schema import Field

_TABLE = "the table"
_CROSSED = "crossed "


def decode_table(columns: RequestColumns, table: pa.Table) -> DecodedRequests:
    """Decode and check a table with the columns of sample files, labels left out; null images are missing ones.

    Raises RequestError that names the column and the row.
    """
    check_columns(columns, table)
    return run_steps(table_steps(columns, table))


def table_steps(columns: RequestColumns, table: pa.Table, first_row: int = 0) -> Steps[DecodedRequests]:
    """Decode a table of the model's columns in pieces; `first_row`: the number of its first row in the body."""
    try:
        reader = _TableReader(columns, table)
        yield from reader.read()
        groups = decode_unlabelled(reader.table, reader.rules, _TABLE, first_row)
    except (DataError, SchemaError) as failure:
        raise RequestError(str(failure)) from None
    except pa.ArrowException as failure:
        raise RequestError(f"{_TABLE} cannot be read: {one_line(failure)}; write plain columns") from None
    yield
    counts_G = np.diff(groups.sample_offsets)
    rows = {"user": np.arange(len(counts_G)), "ad": np.arange(groups.num_samples)}

    def taken(field: Field, column: str) -> Jagged:
        name = _CROSSED + column if _CROSSED + column in groups.columns else column
        return Jagged(*groups.columns[name].take(rows[field.side]))

    try:
        batch = batch_of(columns, taken, counts_G)
    except OverflowingValueError as failure:
        row = failure.row
        if columns.rules[failure.column].side == "ad":
            row = int(np.searchsorted(groups.sample_offsets, row, side="right")) - 1
        raise OverflowingInputError(f"{_TABLE}, row {first_row + row}: {failure}") from None
    return DecodedRequests(batch, counts_G, reader.nulls)


def check_columns(columns: RequestColumns, table: pa.Table) -> None:
    """Raise RequestError if columns of a table are missing, unknown, duplicated or of a wrong type."""
    columns.check_table(table.column_names)
    try:
        check_types(table.schema, columns.rules, _TABLE)
    except SchemaError as failure:
        raise RequestError(str(failure)) from None


class _TableReader:
    """Replaces texts and crossed columns of a table by IDs; `table` and `rules` are then those to decode."""

    def __init__(self, columns: RequestColumns, table: pa.Table) -> None:
        self._columns = columns
        self.table = table
        self.nulls: dict[str, Bool] = {}
        """By column of images: which values were null."""
        self._crossed: set[str] = set()

    @property
    def rules(self) -> dict[str, Rule]:
        """The rules of the table's columns; a crossed column has a name of its own."""
        names = {name: _CROSSED + name if name in self._crossed else name for name in self._columns.rules}
        return {
            names[name]: replace(
                rule,
                crossed=() if name in self._crossed else rule.crossed,
                lengths_of=tuple(names.get(each, each) for each in rule.lengths_of),
            )
            for name, rule in self._columns.rules.items()
        }

    def read(self) -> Steps[None]:
        """Read all columns of texts, of images, and those that are crossed.

        Leaves mistakes, such as nulls or lists of unequal lengths, to decoding, which names their position.
        """
        encoded: dict[str, tuple[list[Index], Encoded]] = {}
        sources = {source for rule in self._columns.rules.values() for source in rule.crossed}
        for name, rule in self._columns.sources.items():
            lists, array = _opened(self.table.column(name), rule)
            if array is None:
                continue
            is_texts = is_text(_dense_type(array))
            if is_texts:
                found, is_null_N = yield from _encoded(array, rule, name)
                array = pa.array(found.ids, pa.int64(), mask=is_null_N)
            elif name in sources and not array.null_count:
                found = encode_numbers(_dense(array).to_numpy(zero_copy_only=False).astype(np.int64))
            if name in sources and not array.null_count:
                encoded[name] = lists, found
            elif name in self._columns.nullable and array.null_count and name not in sources:
                self.nulls[name] = array.is_null().to_numpy(zero_copy_only=False)
                array = pc.fill_null(_dense(array), NO_IMAGE)
            if is_texts or name in self.nulls:
                self._set(name, lists, array)
            yield
        for name, rule in self._columns.rules.items():
            if rule.crossed and encoded.keys() >= set(rule.crossed):
                yield from self._cross(name, [encoded[source] for source in rule.crossed])

    def _cross(self, name: str, sources: list[tuple[list[Index], Encoded]]) -> Steps[None]:
        lists, first = sources[0]
        if not all(np.array_equal(one, other) for ends, _ in sources for one, other in zip(lists, ends, strict=True)):
            return
        ids = [np.zeros(0, np.int64)]
        for start in range(0, len(first.index_N), CROSSED_CHUNK):
            here = slice(start, start + CROSSED_CHUNK)
            ids.append(cross([replace(each, index_N=each.index_N[here]) for _, each in sources]).ids)
            yield
        self._crossed.add(name)
        self._set(_CROSSED + name, lists, pa.array(np.concatenate(ids)))

    def _set(self, name: str, lists: list[Index], array: Any) -> None:
        for ends in reversed(lists):
            array = pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), array)
        place = self.table.schema.get_field_index(name)
        self.table = self.table.append_column(name, array) if place < 0 else self.table.set_column(place, name, array)


def _opened(column: Any, rule: Rule) -> tuple[list[Index], Any]:
    """Return the offsets of a column's lists, outermost first, and their values; None if a list is null."""
    array, lists = column.combine_chunks(), list[Index]()
    for _ in range(rule.depth):
        if array.null_count:
            return lists, None
        array, ends = unwrapped(array)
        lists.append(ends)
    return lists, array


def _encoded(array: Any, rule: Rule, name: str) -> Steps[tuple[Encoded, Bool]]:
    """Hash each distinct text that is used, and return which values are null, (N,)."""
    indexed = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    index_N = pc.fill_null(indexed.indices, 0).to_numpy(zero_copy_only=False).astype(np.int64)
    is_null_N = indexed.indices.is_null().to_numpy(zero_copy_only=False)
    if indexed.dictionary.null_count:
        is_null_N = is_null_N | indexed.dictionary.is_null().to_numpy(zero_copy_only=False)[index_N]
    used_U, index_N[~is_null_N] = np.unique(index_N[~is_null_N], return_inverse=True)
    index_N[is_null_N] = len(used_U)
    yield
    texts, ids = list[str](), list[Index]()
    for start in range(0, len(used_U), CHUNK):
        try:
            chunk = indexed.dictionary.take(pa.array(used_U[start : start + CHUNK])).to_pylist()
        except UnicodeDecodeError:
            raise RequestError(f"{_TABLE}: column {name} has text that is not UTF-8; write it in UTF-8") from None
        chunk = chunk if rule.text == "uri" else [text.strip() for text in chunk]
        texts += chunk
        ids.append(keys_of_uris(chunk) if rule.text == "uri" else ids_of_texts(chunk))
        yield
    return Encoded(np.concatenate([*ids, np.zeros(1, np.int64)]), [*texts, ""], index_N), is_null_N


def _dense_type(array: Any) -> pa.DataType:
    kind: pa.DataType = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
    return kind


def _dense(array: Any) -> Any:
    """Expand a dictionary of numbers."""
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
