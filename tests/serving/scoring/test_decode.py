"""Requests and tables become the very arrays that training makes of a sample file, or one error that names a value."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.errors import NotFiniteError, RequestError
from serving.network import run_steps
from serving.problems import Problem
from serving.scoring.decode import decode, whole_array
from serving.scoring.request import Request
from serving.scoring.sent import UnusableValueError, joined, sent_requests
from tests.raised import raises, told
from tests.serving.scoring.wide import COLUMNS, SCHEMA, decoded, groups, request_of, sent_of, table_of
from trainer.problems import Problem as TrainerProblem
from trainer.samples.columns import decode as decode_file
from trainer.samples.columns import rules_of
from trainer.samples.index import Piece
from trainer.samples.reader import Batch, assemble

TEXTUAL = [name for name, rule in COLUMNS.sources.items() if rule.text]


def assert_same(found: Batch, expected: Batch) -> None:
    assert found.fields.keys() == expected.fields.keys()
    for name in expected.fields:
        same(found.fields[name].values_N, expected.fields[name].values_N, name)
        same(found.fields[name].lengths_M, expected.fields[name].lengths_M, name)
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
    read = decode_file(table, rules_of(SCHEMA), SCHEMA.label, "file", 0)
    expected = assemble(SCHEMA, [Piece(read, 0, read.num_samples)], read.num_samples)
    requests = [request_of(row, scene_in_context=scene_in_context) for row in rows]
    for body in (requests, table.drop_columns(["label"]), table):
        assert_same(decoded(body).batch, expected)
    together = joined([run_steps(sent_requests(COLUMNS, [each])) for each in requests])
    assert_same(run_steps(decode(COLUMNS, together)).batch, expected)
    last = slice(len(rows) - 1, len(rows))
    for body in (table, requests):
        assert_same(run_steps(decode(COLUMNS, sent_of(body).piece(last))).batch, decoded(requests[last]).batch)


def test_numbers_of_binary_tensors_and_of_tables_are_whole_and_fit() -> None:
    assert whole_array(np.array([2**63 - 1], np.uint64)).tolist() == [2**63 - 1]
    unfit = (0, Problem.UNFIT)
    for values, wanted in (([1, 2**63], (1, Problem.BEYOND_64_BITS)), ([1.0], unfit), ([True], unfit)):
        with pytest.raises(UnusableValueError) as failure:
            whole_array(np.array(values, np.uint64 if wanted[0] else None))
        assert (failure.value.place, failure.value.problem) == wanted


ROW: dict[str, Any] = {
    "user": "anna",
    "user_age": 31,
    "user_size": None,
    "user_tags": [1, 2],
    "user_tag_weights": [0.5, 2],
    "behavior_item": [1, 2, 3],
    "behavior_age": [10, 20.5, 30],
    "behavior_shop": ["a", "b", "a"],
    "behavior_image": ["a.jpg", 7, None],
    "ad_item": [5, 6],
    "ad_shops": [[1], [2, 3]],
    "ad_shop_weights": [[1.0], [2.0, 3.0]],
    "ad_price": [0.5, 2],
    "ad_shape": [[1, 2], [3, 4]],
    "ad_image": ["x.jpg", None],
    "ad_scene": [4, 4],
}
ADS = [name for name in ROW if name.startswith("ad_")]
C, U, X = "candidates", "user", "context"
OF_SHOPS, OF_ITEMS = {"other": "ad_shops"}, {"other": "behavior_item"}


def parts(scene: bool = True) -> dict[str, dict[str, Any]]:
    row = copy.deepcopy(ROW)
    ads = {name: row.pop(name) for name in ADS}
    return {U: row, X: {"ad_scene": ads.pop("ad_scene")[0]} if scene else {}, C: ads}


def request(*changes: tuple[str, str, Any]) -> Request:
    """A good request with some columns changed, each by its part, name and value, or left out (...)."""
    made = parts()
    for part, column, value in changes:
        made[part][column] = value
        if value is ...:
            del made[part][column]
    return Request(user=made[U], context=made[X], candidates=made[C])


def refused(*requests: Request, problem: Problem, **values: Any) -> None:
    with raises(RequestError, problem, **values) as error:
        decoded(requests)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "column", "value", "problem", "inside", "values"),
    [
        (C, "ad_item", [5, 1.5], Problem.UNFIT, "[1]", {"value": 1.5}),
        (C, "ad_item", [5, 2.0**70], Problem.BEYOND_64_BITS, "[1]", {"value": 2.0**70}),
        (C, "ad_item", [5, True], Problem.UNFIT, "[1]", {"value": "true"}),
        (C, "ad_item", [None, 5], Problem.UNFIT, "[0]", {"value": "null"}),
        (C, "ad_item", [2**63, 5], Problem.BEYOND_64_BITS, "[0]", {"value": 2**63}),
        (C, "ad_item", [-(2**63) - 1, "a"], Problem.BEYOND_64_BITS, "[0]", {"value": -(2**63) - 1}),
        (C, "ad_item", [5, {"a": [1]}], Problem.UNFIT, "[1]", {"value": '{"a": [1]}'}),
        (C, "ad_item", [5], Problem.OTHER_CANDIDATES, "", {"value": 1, "count": 2}),
        (C, "ad_shops", [[1], 7], Problem.UNFIT, "[1]", {"value": 7}),
        (C, "ad_shops", [[1], [2, [3]]], Problem.UNFIT, "[1][1]", {"value": "[3]"}),
        (C, "ad_shops", [[1], [2, True]], Problem.UNFIT, "[1][1]", {"value": "true"}),
        (C, "ad_shop_weights", [[1], [2]], Problem.UNEQUAL_LENGTHS, "[1]", OF_SHOPS | {"value": 1, "length": 2}),
        (C, "ad_price", [1, float("nan")], Problem.NOT_FINITE, "[1]", {"value": "nan"}),
        (C, "ad_price", [1, 1e39], Problem.NOT_FINITE, "[1]", {"value": 1e39}),
        (C, "ad_price", [1, 10**400], Problem.NOT_FINITE, "[1]", {"value": 10**400}),
        (C, "ad_price", [1, None], Problem.UNFIT, "[1]", {"value": "null", "wanted": re.compile("a number.* fill ")}),
        (C, "ad_price", [1, "2"], Problem.UNFIT, "[1]", {"value": '"2"'}),
        (C, "ad_shape", [[1, 2], [3]], Problem.OTHER_LENGTH, "[1]", {"value": 1, "width": 2}),
        (X, "ad_scene", [], Problem.UNFIT, "", {"value": "[]"}),
        (X, "ad_scene", 2**63, Problem.BEYOND_64_BITS, "", {"value": 2**63}),
        (U, "user", ["anna"], Problem.UNFIT, "", {"value": '["anna"]'}),
        (U, "user_age", float("inf"), Problem.NOT_FINITE, "", {"value": "inf"}),
        (U, "behavior_item", None, Problem.UNFIT, "", {"value": "null"}),
        (U, "behavior_item", "1,2,3", Problem.UNFIT, "", {"value": '"1,2,3"'}),
        (U, "behavior_age", [1, 2], Problem.UNEQUAL_LENGTHS, "", OF_ITEMS | {"value": 2, "length": 3}),
        (U, "behavior_image", [1, 2], Problem.UNEQUAL_LENGTHS, "", OF_ITEMS | {"value": 2, "length": 3}),
        (C, "ad_shops", [[1], [False, 3]], Problem.UNFIT, "[1][0]", {"value": "false"}),
        (C, "ad_shops", [[1], [[]]], Problem.UNFIT, "[1][0]", {"value": "[]"}),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_as_it_was_sent(
    part: str, column: str, value: Any, problem: Problem, inside: str, values: dict[str, Any]
) -> None:
    refused(request((part, column, value)), problem=problem, where=f"{part}.{column}{inside}", **values)


ITEMS, PRICE = "a list with a whole number or text for each candidate", "candidates.ad_price"
IMAGE, PRISE = "user.behavior_image", 'column "ad_prise"'
NO_PRICE = {"column": PRICE, "wanted": "a list with a number for each candidate"}


@pytest.mark.parametrize(
    ("changes", "problem", "values"),
    [
        ([(C, "ad_item", 5)], Problem.UNFIT, {"where": "candidates.ad_item", "value": 5, "wanted": ITEMS}),
        ([(C, "ad_price", ...)], Problem.NO_COLUMN, NO_PRICE),
        ([(U, "user", ...)], Problem.NO_COLUMN, {"column": "user.user", "wanted": "a whole number or text"}),
        ([(U, "user", ...), (C, "ad_price", ...)], Problem.NO_COLUMNS, {"count": 2, "columns": f"user.user, {PRICE}"}),
        ([(C, "ad_prise", [1])], Problem.UNKNOWN_COLUMN, {"where": f'{C}."ad_prise"', "hint": re.compile("ad_price")}),
        ([(C, "user", [1, 2])], Problem.OF_USER, {"where": "candidates.user"}),
        ([(U, "ad_item", [5, 6])], Problem.OF_AD, {"where": "user.ad_item"}),
        ([(C, "ad_scene", [1, 2])], Problem.IN_BOTH, {"where": "", "value": "ad_scene"}),
    ],
)
def test_columns_that_are_missing_or_in_the_wrong_place(
    changes: list[tuple[str, str, Any]], problem: Problem, values: dict[str, Any]
) -> None:
    refused(request(*changes), problem=problem, **values)


@pytest.mark.parametrize(
    ("place", "change", "problem", "values"),
    [
        (1, (C, "ad_item", [5, None]), Problem.UNFIT, {"where": f"requests[1]: {C}.ad_item[1]", "value": "null"}),
        (1, (X, "ad_scene", None), Problem.UNFIT, {"where": f"requests[1]: {X}.ad_scene", "value": "null"}),
        (2, (U, "behavior_image", [1, 1.5, 2]), Problem.UNFIT, {"where": f"requests[2]: {IMAGE}[1]", "value": 1.5}),
        (2, (C, "ad_price", ...), Problem.NO_COLUMN, {"where": "requests[2]: ", "column": PRICE}),
    ],
)
def test_which_of_several_requests_is_named(
    place: int, change: tuple[str, str, Any], problem: Problem, values: dict[str, Any]
) -> None:
    refused(*[request()] * place, request(change), problem=problem, **values)


def test_a_number_that_its_transform_makes_infinite_is_named_in_every_piece() -> None:
    whole = sent_of([request(), request((U, "user_size", -3.3e38)), request((U, "user_size", 3.4e38))])
    assert run_steps(decode(COLUMNS, whole.piece(slice(0, 1)))).batch.num_samples == 2
    for piece, said in ((slice(0, 3), 1), (slice(1, 3), 1), (slice(2, 3), 2)):
        with raises(NotFiniteError, TrainerProblem.TOO_BIG, where=f"requests[{said}]: user.user_size"):
            run_steps(decode(COLUMNS, whole.piece(piece)))


def test_roles_are_ignored_wherever_they_are() -> None:
    expected = decoded([request()]).batch
    with_roles = request((C, "label", [0, 1]), (U, "timestamp", 7), (X, "label", None))
    found = decoded([with_roles]).batch
    np.testing.assert_array_equal(found.fields["ad_item"].values_N, expected.fields["ad_item"].values_N)


def test_null_images_are_missing_and_have_key_zero() -> None:
    found = decoded([request(), request((U, "behavior_image", ["a.jpg", 7, 8]))])
    nulls = {name: np.flatnonzero(mask).tolist() for name, mask in found.nulls.items()}
    assert nulls == {"behavior_image": [2], "ad_image": [1, 3]}
    assert found.batch.fields["ad_image"].values_N[[1, 3]].tolist() == [0, 0]
    images, in_texts = ["a.jpg", "7", None], frozenset({"user", "behavior_shop", "behavior_image", "ad_image"})
    of_table = decoded(table_of([{**ROW, "behavior_image": images}], in_texts))
    of_request = decoded([request((U, "behavior_image", images))])
    assert_same(of_table.batch, of_request.batch)
    for name in ("behavior_image", "ad_image"):
        same(of_table.nulls[name], of_request.nulls[name], name)


@pytest.mark.parametrize("candidates", [{}, {"ad_item": []}, {name: [] for name in ADS}])
def test_no_candidates_are_no_error(candidates: dict[str, Any]) -> None:
    empty = Request(user=parts()[U], candidates=candidates)
    assert sent_of([empty, request(), empty]).counts_G.tolist() == [0, 2, 0]
    assert decoded([empty, request(), empty]).batch.group_of_sample_B.tolist() == [1, 1]
    assert decoded([empty]).batch.num_samples == 0


def test_what_is_in_context_is_as_if_each_candidate_had_it() -> None:
    """Of some requests, also lists, which count for each candidate."""
    in_context = request((C, "ad_shops", ...), (C, "ad_shop_weights", ...), (X, "ad_shops", [1, 2]))
    in_context = replace(in_context, context={**in_context.context, "ad_shop_weights": [0.5, 2]})
    in_candidates = request((C, "ad_shops", [[1, 2]] * 2), (C, "ad_shop_weights", [[0.5, 2]] * 2))
    found, expected = sent_of([request(), in_context]), sent_of([request(), in_candidates])
    assert_same(run_steps(decode(COLUMNS, found)).batch, run_steps(decode(COLUMNS, expected)).batch)
    last = slice(1, 2)
    assert_same(run_steps(decode(COLUMNS, found.piece(last))).batch, decoded([in_candidates]).batch)
    assert found.sizes(COLUMNS).values_G[1] == expected.sizes(COLUMNS).values_G[1] - 4
    wrong = replace(in_context, context={**in_context.context, "ad_shops": [1, 1.5]})
    refused(request(), wrong, problem=Problem.UNFIT, where="requests[1]: context.ad_shops[1]", value=1.5)


PLAIN_ROW = {**ROW, "user": 1, "behavior_shop": [1, 2, 1], "behavior_image": [1, 2, 3], "ad_image": [1, 2]}
TableChange = Callable[[pa.Table], pa.Table]


def with_column(name: str, values: Any) -> TableChange:
    return lambda table: table.set_column(table.column_names.index(name), name, values)


COLUMN_CHANGES: list[tuple[TableChange, str]] = [
    (lambda t: t.drop_columns(["ad_price"]), told(Problem.NO_COLUMN, **NO_PRICE | {"column": "column ad_price"})),
    (lambda t: t.append_column("ad_prise", t["ad_price"]), told(Problem.UNKNOWN_COLUMN, where=PRISE)),
    (lambda t: t.append_column("ad_item", t["ad_item"]), "ad_item"),
    (lambda t: t.append_column("behavior_item", t["behavior_item"]), "behavior_item"),
    (lambda t: with_column("user", t["user"].cast(pa.float64()))(t), "column user is double, expected integer"),
]
"""Found with rows or without."""
NULL_USER = told(Problem.NULL, where="the table, row 0: column user")


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        (1, with_column("user", pa.array([None], pa.int64())), NULL_USER),
        (1, with_column("ad_item", pa.array([[1]])), told(Problem.OTHER_CANDIDATES, value=2, count=1)),
        *((rows, *each) for rows in (0, 1) for each in COLUMN_CHANGES),
    ],
)
def test_what_is_wrong_in_a_table_is_named(rows: int, change: TableChange, message: str) -> None:
    table = table_of([PLAIN_ROW], frozenset()).slice(0, rows)
    decoded(table)
    with pytest.raises(RequestError, match=message):
        decoded(change(table))
