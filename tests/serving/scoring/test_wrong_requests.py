"""Requests that cannot be scored: one error that names place and value, in each form; and what is no error."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.errors import RequestError
from serving.scoring.arrow import decode_table
from serving.scoring.decode import decode_requests
from serving.scoring.request import Request, RequestColumns
from tests.serving.scoring.wide import SCHEMA, table_of

COLUMNS = RequestColumns(SCHEMA, SCHEMA.fields)
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
    "behavior_album": [["a.jpg"], [], ["b.jpg", "c.jpg"]],
    "ad_item": [5, 6],
    "ad_shops": [[1], [2, 3]],
    "ad_shop_weights": [[1.0], [2.0, 3.0]],
    "ad_price": [0.5, 2],
    "ad_shape": [[1, 2], [3, 4]],
    "ad_image": ["x.jpg", None],
    "ad_album": [[], ["x.jpg"]],
    "ad_scene": [4, 4],
}
ADS = [name for name in ROW if name.startswith("ad_")]
C, U, X = "candidates", "user", "context"


def parts(scene: bool = True) -> dict[str, dict[str, Any]]:
    row = copy.deepcopy(ROW)
    ads = {name: row.pop(name) for name in ADS}
    return {U: row, X: {"ad_scene": ads.pop("ad_scene")[0]} if scene else {}, C: ads}


def request(*changes: tuple[str, str, Any], as_tensors: bool = False) -> Request:
    """A good request with some columns changed, each by its part, name and value, or left out (...)."""
    made = parts()
    for part, column, value in changes:
        made[part][column] = value
        if value is ...:
            del made[part][column]
    return Request(user=made[U], context=made[X], candidates=made[C], as_tensors=as_tensors)


def refusal(*requests: Request) -> str:
    with pytest.raises(RequestError) as error:
        decode_requests(COLUMNS, requests)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("as_tensors", [False, True], ids=["parts", "tensors"])
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
        (C, "ad_item", ["\ud800", "a"], '[0] is "\\ud800", a text that is not Unicode'),
        (C, "ad_item", [5], " has 1 entries and"),
        (C, "ad_shops", [[1], 7], "[1] is 7,"),
        (C, "ad_shops", [[1], [2, [3]]], "[1][1] is [3],"),
        (C, "ad_shops", [[1], [2, True]], "[1][1] is true,"),
        (C, "ad_shop_weights", [[1], [2]], "[1] has 1 entries, and ad_shops has 2"),
        (C, "ad_price", [1, float("nan")], "[1] is nan,"),
        (C, "ad_price", [1, 1e39], "[1] is 1e+39,"),
        (C, "ad_price", [1, 10**400], "[1] is 1000"),
        (C, "ad_price", [1, None], "[1] is null, and has to be a number; give its field fill"),
        (C, "ad_price", [1, "2"], '[1] is "2",'),
        (C, "ad_shape", [[1, 2], [3]], "[1] has 1 numbers; the schema says width=2"),
        (X, "ad_scene", "\udfff", ' is "\\udfff", a text that is not Unicode'),
        (X, "ad_scene", [], " is [],"),
        (X, "ad_scene", 2**63, " is 9223372036854775808, beyond 64 bits"),
        (U, "user", ["anna"], ' is ["anna"],'),
        (U, "user_age", float("inf"), " is inf,"),
        (U, "behavior_item", None, " is null,"),
        (U, "behavior_item", "1,2,3", ' is "1,2,3",'),
        (U, "behavior_age", [1, 2], " has 2 entries, and behavior_item has 3 there"),
        (U, "behavior_album", [["a.jpg"], [], 4], "[2] is 4,"),
        (U, "behavior_album", [["a.jpg"], [[]], []], "[1][0] is [],"),
    ],
)
def test_a_wrong_value_is_named_as_it_was_sent(part: str, column: str, value: Any, said: str, as_tensors: bool) -> None:
    """By its part and column; a client of tensors has never sent parts."""
    found = refusal(request((part, column, value), as_tensors=as_tensors))
    where = f"input {column}" if as_tensors else f"{part}.{column}"
    assert (where + said if said[0] in "[ " else said) in found
    assert not (as_tensors and any(f"{each}." in found for each in (C, U, X)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([(C, "ad_item", 5)], "candidates.ad_item is 5, and has to be a list with an entry for each candidate"),
        ([(C, "ad_price", ...)], "column ad_price is missing, expected a number for each candidate"),
        ([(U, "user", ...)], "column user is missing, expected a whole number or text; put it into user"),
        ([(U, "user", ...), (C, "ad_price", ...)], "2 columns are missing. user: put each into user. ad_price: put"),
        ([(C, "ad_prise", [1, 2])], 'candidates."ad_prise" is not a column of the model; did you mean ad_price?'),
        ([(C, "user", [1, 2])], "candidates.user is a column of side user; put it into user"),
        ([(U, "ad_item", [5, 6])], "user.ad_item is a column of side ad; put it into candidates, or into context"),
        ([(C, "ad_scene", [1, 2])], "column ad_scene is in context and in candidates; leave one out"),
        ([(U, "behavior_item", [1, 2])], "needs one entry in both"),
    ],
)
def test_columns_that_are_missing_or_in_the_wrong_place(changes: list[tuple[str, str, Any]], said: str) -> None:
    assert said in refusal(request(*changes))


def test_missing_tensors_are_named() -> None:
    found = refusal(request((C, "ad_price", ...), as_tensors=True))
    assert found == "input ad_price is missing, expected a number for each candidate; send a tensor of this name"
    found = refusal(request((U, "user", ...), (C, "ad_price", ...), as_tensors=True))
    assert found == "2 inputs are missing: ad_price, user; send a tensor for each"


@pytest.mark.parametrize(
    ("place", "change", "said"),
    [
        (1, (C, "ad_item", [5, None]), "requests[1]: candidates.ad_item[1] is null"),
        (1, (X, "ad_scene", None), "requests[1]: context.ad_scene is null"),
        (2, (U, "behavior_image", [1, 1.5, 2]), "requests[2]: user.behavior_image[1] is 1.5"),
    ],
)
def test_which_of_several_requests_is_named(place: int, change: tuple[str, str, Any], said: str) -> None:
    assert refusal(*[request()] * place, request(change)).startswith(said)


def test_roles_are_ignored_wherever_they_are() -> None:
    expected = decode_requests(COLUMNS, [request()]).batch
    with_roles = request((C, "label", [0, 1]), (U, "timestamp", 7), (X, "label", None))
    found = decode_requests(COLUMNS, [with_roles]).batch
    np.testing.assert_array_equal(found.fields["ad_item"].values_N, expected.fields["ad_item"].values_N)


def test_null_images_are_missing_and_have_key_zero() -> None:
    decoded = decode_requests(COLUMNS, [request(), request((U, "behavior_image", ["a.jpg", 7, 8]))])
    nulls = {name: np.flatnonzero(mask).tolist() for name, mask in decoded.nulls.items()}
    assert nulls == {"behavior_image": [2], "ad_image": [1, 3]}
    assert decoded.batch.fields["ad_image"].values_N[[1, 3]].tolist() == [0, 0]


def test_null_images_of_tables_are_missing_too() -> None:
    texts = frozenset({"user", "behavior_shop", "behavior_image", "behavior_album", "ad_image", "ad_album"})
    row = {**ROW, "behavior_image": ["a.jpg", "7", None]}
    decoded = decode_table(COLUMNS, table_of([row, row], texts))
    expected = decode_requests(COLUMNS, [Request(**parts(scene=False))] * 2)
    for name, mask in decoded.nulls.items():
        np.testing.assert_array_equal(mask, expected.nulls[name])
    images, wanted = (each.batch.fields["ad_image"].values_N[[0, 2]] for each in (decoded, expected))
    np.testing.assert_array_equal(images, wanted)


@pytest.mark.parametrize("candidates", [{}, {"ad_item": []}, {name: [] for name in ADS}])
def test_no_candidates_are_no_error(candidates: dict[str, Any]) -> None:
    empty = Request(user=parts()[U], candidates=candidates)
    decoded = decode_requests(COLUMNS, [empty, request(), empty])
    assert decoded.counts_G.tolist() == [0, 2, 0]
    assert decoded.batch.group_of_sample_B.tolist() == [1, 1]
    assert decode_requests(COLUMNS, [empty]).batch.num_samples == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["ad_price"]), "the table: column ad_price is missing"),
        (lambda t: t.append_column("ad_prise", t["ad_price"]), 'column "ad_prise" is not a column of the model'),
        (lambda t: t.set_column(0, "user", pa.array([1.5])), "column user is double, expected integer"),
        (lambda t: t.set_column(0, "user", pa.array([None], pa.int64())), "the table, row 0: column user is null"),
        (
            lambda t: t.set_column(t.column_names.index("ad_item"), "ad_item", pa.array([[1]])),
            "needs one entry in both",
        ),
    ],
)
def test_wrong_tables_are_named(change: Callable[[pa.Table], pa.Table], message: str) -> None:
    row = {**ROW, "user": 1, "behavior_shop": [1, 2, 1], "behavior_image": [1, 2, 3], "ad_image": [1, 2]}
    row |= {"behavior_album": [[1], [], [2]], "ad_album": [[], [1]]}
    table = table_of([row], frozenset())
    decode_table(COLUMNS, table)
    with pytest.raises(RequestError) as error:
        decode_table(COLUMNS, change(table))
    assert message in str(error.value)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=4)
    | st.sampled_from([2**63, -(2**63) - 1, 1e308, "0", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=6,
)


@pytest.mark.long
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_anything_is_decoded_or_refused(data: st.DataObject) -> None:
    check_anything(data)


@pytest.mark.slow
@settings(max_examples=2_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_much_more_is_decoded_or_refused(data: st.DataObject) -> None:
    check_anything(data)


def check_anything(data: st.DataObject) -> None:
    """Nothing that a body can hold raises another error, or makes a batch of uneven columns."""
    made = [parts(), parts()]
    for _ in range(data.draw(st.integers(1, 3))):
        columns = data.draw(st.sampled_from(made))[data.draw(st.sampled_from([U, X, C]))]
        column = data.draw(st.sampled_from([*ROW, "label", "x"]))
        value = data.draw(ANYTHING | st.lists(ANYTHING, min_size=2, max_size=2))
        columns[column] = value
    try:
        decoded = decode_requests(COLUMNS, [Request(**each) for each in made])
    except RequestError as failure:
        str(failure).encode()
        return
    batch = decoded.batch
    for field in SCHEMA.of_kind("id", "multi_id", "content"):
        jagged = batch.fields[field.name]
        assert len(jagged.lengths_M) == (batch.num_samples if field.side == "ad" else 2)
        assert jagged.lengths_M.sum() == len(jagged.values_N)
