"""Requests and tables become the very arrays that training makes of a sample file, or one error that names a value."""

import copy
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
from serving.scoring.decode import decode, whole_array
from serving.scoring.request import Request
from serving.scoring.sent import UnusableValueError, joined, sent_requests
from tests.serving.scoring.wide import COLUMNS, SCHEMA, decoded, groups, request_of, sent_of, table_of
from trainer.samples.columns import decode as decode_file
from trainer.samples.columns import rules_of
from trainer.samples.index import Piece
from trainer.samples.reader import Batch, assemble

TEXTUAL = [name for name, rule in COLUMNS.sources.items() if rule.text]


def of_training(table: pa.Table) -> Batch:
    decoded = decode_file(table, rules_of(SCHEMA), SCHEMA.label, "file", 0)
    return assemble(SCHEMA, [Piece(decoded, 0, decoded.num_samples)], decoded.num_samples)


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
    expected = of_training(table)
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
    for values, place in (([1, 2**63], 1), ([1.0], 0), ([True], 0)):
        with pytest.raises(UnusableValueError) as failure:
            whole_array(np.array(values, np.uint64 if place else None))
        assert failure.value.place == place


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


def refusal(*requests: Request) -> str:
    with pytest.raises(RequestError) as error:
        decoded(requests)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("part", "column", "value", "said"),
    [
        (C, "ad_item", [5, 1.5], "[1] is 1.5,"),
        (C, "ad_item", [5, 2.0**70], "send a number beyond 64 bits as a text"),
        (C, "ad_item", [5, True], "[1] is true,"),
        (C, "ad_item", [None, 5], "[0] is null,"),
        (C, "ad_item", [2**63, 5], "[0] is 9223372036854775808, beyond 64 bits"),
        (C, "ad_item", [-(2**63) - 1, "a"], "[0] is -9223372036854775809, beyond 64 bits"),
        (C, "ad_item", [5, {"a": [1]}], '[1] is {"a": [1]},'),
        (C, "ad_item", [5], " has 1 entries, but there are 2 candidates"),
        (C, "ad_shops", [[1], 7], "[1] is 7,"),
        (C, "ad_shops", [[1], [2, [3]]], "[1][1] is [3],"),
        (C, "ad_shops", [[1], [2, True]], "[1][1] is true,"),
        (C, "ad_shop_weights", [[1], [2]], "[1] has 1 entries, but ad_shops has 2 there: values"),
        (C, "ad_price", [1, float("nan")], "[1] is nan,"),
        (C, "ad_price", [1, 1e39], "[1] is 1e+39,"),
        (C, "ad_price", [1, 10**400], "[1] is 1000"),
        (C, "ad_price", [1, None], "[1] is null, and has to be a number; give its field fill"),
        (C, "ad_price", [1, "2"], '[1] is "2",'),
        (C, "ad_shape", [[1, 2], [3]], "[1] has 1 entries, but the schema says width=2"),
        (X, "ad_scene", [], " is [],"),
        (X, "ad_scene", 2**63, " is 9223372036854775808, beyond 64 bits"),
        (U, "user", ["anna"], ' is ["anna"],'),
        (U, "user_age", float("inf"), " is inf,"),
        (U, "behavior_item", None, " is null,"),
        (U, "behavior_item", "1,2,3", ' is "1,2,3",'),
        (U, "behavior_age", [1, 2], " has 2 entries, but behavior_item has 3 there: values"),
        (U, "behavior_image", [1, 2], " has 2 entries, but behavior_item has 3 there: behaviours belong together"),
        (C, "ad_shops", [[1], [False, 3]], "[1][0] is false,"),
        (C, "ad_shops", [[1], [[]]], "[1][0] is [],"),
    ],
)
def test_a_wrong_value_is_named_as_it_was_sent(part: str, column: str, value: Any, said: str) -> None:
    found = refusal(request((part, column, value)))
    assert (f"{part}.{column}{said}" if said[0] in "[ " else said) in found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([(C, "ad_item", 5)], "candidates.ad_item is 5, and has to be a list with a whole number or text for each"),
        ([(C, "ad_price", ...)], "candidates.ad_price is missing, expected a list with a number for each candidate"),
        ([(U, "user", ...)], "user.user is missing, expected a whole number or text"),
        ([(U, "user", ...), (C, "ad_price", ...)], "2 columns are missing: user.user, candidates.ad_price"),
        ([(C, "ad_prise", [1, 2])], 'candidates."ad_prise" is not a column of the model; did you mean ad_price?'),
        ([(C, "user", [1, 2])], "candidates.user is a column of side user; put it into user"),
        ([(U, "ad_item", [5, 6])], "user.ad_item is a column of side ad; put it into candidates, or into context"),
        ([(C, "ad_scene", [1, 2])], "column ad_scene is in context and in candidates; leave one out"),
    ],
)
def test_columns_that_are_missing_or_in_the_wrong_place(changes: list[tuple[str, str, Any]], said: str) -> None:
    assert said in refusal(request(*changes))


@pytest.mark.parametrize(
    ("place", "change", "said"),
    [
        (1, (C, "ad_item", [5, None]), "requests[1]: candidates.ad_item[1] is null"),
        (1, (X, "ad_scene", None), "requests[1]: context.ad_scene is null"),
        (2, (U, "behavior_image", [1, 1.5, 2]), "requests[2]: user.behavior_image[1] is 1.5"),
        (2, (C, "ad_price", ...), "requests[2]: candidates.ad_price is missing"),
    ],
)
def test_which_of_several_requests_is_named(place: int, change: tuple[str, str, Any], said: str) -> None:
    assert refusal(*[request()] * place, request(change)).startswith(said)


def test_a_number_that_its_transform_makes_infinite_is_named_in_every_piece() -> None:
    whole = sent_of([request(), request((U, "user_size", -3.3e38)), request((U, "user_size", 3.4e38))])
    assert run_steps(decode(COLUMNS, whole.piece(slice(0, 1)))).batch.num_samples == 2
    for piece, said in ((slice(0, 3), 1), (slice(1, 3), 1), (slice(2, 3), 2)):
        with pytest.raises(NotFiniteError, match=rf"^requests\[{said}\]: user.user_size has"):
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
    assert refusal(request(), wrong).startswith("requests[1]: context.ad_shops[1] is 1.5")


PLAIN_ROW = {**ROW, "user": 1, "behavior_shop": [1, 2, 1], "behavior_image": [1, 2, 3], "ad_image": [1, 2]}
TableChange = Callable[[pa.Table], pa.Table]


def with_column(name: str, values: Any) -> TableChange:
    return lambda table: table.set_column(table.column_names.index(name), name, values)


COLUMN_CHANGES: list[tuple[TableChange, str]] = [
    (lambda t: t.drop_columns(["ad_price"]), "column ad_price is missing, expected a list with a number"),
    (lambda t: t.append_column("ad_prise", t["ad_price"]), 'column "ad_prise" is not a column of the model'),
    (lambda t: t.append_column("ad_item", t["ad_item"]), "ad_item"),
    (lambda t: t.append_column("behavior_item", t["behavior_item"]), "behavior_item"),
    (lambda t: with_column("user", t["user"].cast(pa.float64()))(t), "column user is double, expected integer"),
]
"""Found with rows or without."""


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        (1, with_column("user", pa.array([None], pa.int64())), "the table, row 0: column user is null"),
        (1, with_column("ad_item", pa.array([[1]])), "has 2 entries, but there are 1 candidates"),
        *((rows, *each) for rows in (0, 1) for each in COLUMN_CHANGES),
    ],
)
def test_what_is_wrong_in_a_table_is_named(rows: int, change: TableChange, message: str) -> None:
    table = table_of([PLAIN_ROW], frozenset()).slice(0, rows)
    decoded(table)
    with pytest.raises(RequestError, match=message):
        decoded(change(table))
