"""Requests, as Python has them or as Arrow tables, become the very arrays that training makes of a sample file."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.scoring.arrow import decode_table
from serving.scoring.decode import all_integers, decode_requests
from serving.scoring.request import RequestColumns
from tests.serving.scoring.wide import SCHEMA, groups, request_of, table_of
from trainer.samples.columns import decode, rules_of
from trainer.samples.index import Piece
from trainer.samples.reader import Batch, BatchPosition, assemble

COLUMNS = RequestColumns(SCHEMA, SCHEMA.fields)
TEXTUAL = [name for name, rule in COLUMNS.sources.items() if rule.text]


def of_training(table: pa.Table) -> Batch:
    decoded = decode(table, rules_of(SCHEMA), SCHEMA.label, "file", 0)
    every = np.arange(table.num_rows)
    piece = Piece(decoded, every, decoded.sample_offsets[:-1], decoded.sample_offsets[1:])
    return assemble(SCHEMA, [piece], decoded.num_samples, BatchPosition(0, 0))


def assert_same(found: Batch, expected: Batch) -> None:
    assert found.fields.keys() == expected.fields.keys()
    for name in expected.fields:
        same(found.fields[name].values_N, expected.fields[name].values_N, name)
        same(found.fields[name].lengths_M, expected.fields[name].lengths_M, name)
    for name in expected.galleries:
        same(found.galleries[name].values_N, expected.galleries[name].values_N, name)
        same(found.galleries[name].lengths_M, expected.galleries[name].lengths_M, name)
    for part in ("dense", "weights"):
        mine, theirs = getattr(found, part), getattr(expected, part)
        assert mine.keys() == theirs.keys()
        for name in theirs:
            same(mine[name], theirs[name], name)
    same(found.group_of_sample_B, expected.group_of_sample_B, "group")
    assert found.num_samples == expected.num_samples


def same(found: Any, expected: Any, name: str) -> None:
    assert found.dtype == expected.dtype, name
    np.testing.assert_array_equal(found, expected, err_msg=name)


@st.composite
def files(draw: Any) -> tuple[list[dict[str, Any]], frozenset[str]]:
    in_texts = frozenset(draw(st.sets(st.sampled_from(TEXTUAL))))
    return draw(st.lists(groups(in_texts=in_texts), min_size=1, max_size=3)), in_texts


@pytest.mark.long
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(files(), st.booleans())
def test_requests_are_decoded_as_training_decodes_files(
    file: tuple[list[dict[str, Any]], frozenset[str]], scene_in_context: bool
) -> None:
    rows, in_texts = file
    table = table_of(rows, in_texts)
    expected = of_training(table)
    requests = [request_of(row, scene_in_context=scene_in_context) for row in rows]
    assert_same(decode_requests(COLUMNS, requests).batch, expected)
    assert_same(decode_table(COLUMNS, table.drop_columns(["label"])).batch, expected)
    assert_same(decode_table(COLUMNS, table).batch, expected)


@pytest.mark.parametrize("columns", [[[True]], [[1, 2], [3, False]], [[0, 1], [True, 1, 0]]])
def test_true_and_false_are_not_integers(columns: list[list[Any]]) -> None:
    assert all_integers(columns) is None
    assert all_integers([[int(value) for value in column] for column in columns]) is not None
