"""Requests that cannot be scored: one error that names the place, the value and the way out; and what is no error."""

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


def parts(scene: bool = True) -> dict[str, dict[str, Any]]:
    row = copy.deepcopy(ROW)
    ads = {name: row.pop(name) for name in list(row) if name.startswith("ad_")}
    context = {"ad_scene": ads.pop("ad_scene")[0]} if scene else {}
    return {"user": row, "context": context, "candidates": ads}


def request(**changes: Any) -> Request:
    """A good request with some columns changed (`user__age=1`), or left out (...)."""
    made = parts()
    for name, value in changes.items():
        part, _, column = name.partition("__")
        if value is ...:
            del made[part][column]
        else:
            made[part][column] = value
    return Request(**made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates__ad_item": [5, 1.5]}, "candidates.ad_item[1] is 1.5, and has to be a whole number or a text"),
        ({"candidates__ad_item": [5, 2.0**70]}, "a whole number or a text; send a number beyond 64 bits as a text"),
        ({"candidates__ad_item": [5, True]}, "candidates.ad_item[1] is true, and has to be a whole number or a text"),
        ({"candidates__ad_item": [None, 5]}, "candidates.ad_item[0] is null, and has to be"),
        ({"candidates__ad_item": [2**63, 5]}, "candidates.ad_item[0] is 9223372036854775808, beyond 64 bits"),
        ({"candidates__ad_item": [-(2**63) - 1, "a"]}, "candidates.ad_item[0] is -9223372036854775809, beyond"),
        ({"candidates__ad_item": [5, {"a": [1]}]}, 'candidates.ad_item[1] is {"a": [1]}, and has to be'),
        ({"candidates__ad_item": ["\ud800", "a"]}, 'candidates.ad_item[0] is "\\ud800", a text that is not Unicode'),
        ({"candidates__ad_item": [5]}, "candidates.ad_item has 1 entries and candidates.ad_shops has 2"),
        ({"candidates__ad_item": 5}, "candidates.ad_item is 5, and has to be a list with an entry for each candidate"),
        ({"candidates__ad_shops": [[1], 7]}, "candidates.ad_shops[1] is 7, and has to be a list of whole numbers or"),
        ({"candidates__ad_shops": [[1], [2, [3]]]}, "candidates.ad_shops[1][1] is [3], and has to be a whole number"),
        (
            {"candidates__ad_shop_weights": [[1], [2]]},
            "candidates.ad_shop_weights[1] has 1 entries, and ad_shops has 2",
        ),
        ({"candidates__ad_price": [1, float("nan")]}, "candidates.ad_price[1] is nan, and has to be a finite float32"),
        ({"candidates__ad_price": [1, 1e39]}, "candidates.ad_price[1] is 1e+39, and has to be a finite float32"),
        ({"candidates__ad_price": [1, 10**400]}, "and has to be a finite float32 number"),
        ({"candidates__ad_price": [1, None]}, "candidates.ad_price[1] is null, and has to be a number; give its field"),
        ({"candidates__ad_price": [1, "2"]}, 'candidates.ad_price[1] is "2", and has to be a number'),
        ({"candidates__ad_shape": [[1, 2], [3]]}, "candidates.ad_shape[1] has 1 numbers; the schema says width=2"),
        ({"candidates__ad_price": ...}, "column ad_price is missing, expected a number for each candidate"),
        (
            {"candidates__ad_prise": [1, 2]},
            'candidates."ad_prise" is not a column of the model; did you mean ad_price?',
        ),
        ({"candidates__user": [1, 2]}, "candidates.user is a column of side user; put it into user"),
        ({"candidates__ad_scene": [1, 2]}, "column ad_scene is in context and in candidates; leave one out"),
        ({"context__ad_scene": "\udfff"}, 'context.ad_scene is "\\udfff", a text that is not Unicode'),
        ({"context__ad_scene": []}, "context.ad_scene is [], and has to be a whole number or a text"),
        (
            {"user__user": ..., "candidates__ad_price": ...},
            "2 columns are missing. user: put each into user. ad_price: put each into candidates, or into context",
        ),
        ({"user__user": ...}, "column user is missing, expected a whole number or text; put it into user"),
        ({"user__user": ["anna"]}, 'user.user is ["anna"], and has to be a whole number or a text'),
        ({"user__user_age": float("inf")}, "user.user_age is inf, and has to be a finite float32 number"),
        ({"user__behavior_item": None}, "user.behavior_item is null, and has to be a list of whole numbers or texts"),
        ({"user__behavior_item": "1,2,3"}, 'user.behavior_item is "1,2,3", and has to be a list of'),
        ({"user__behavior_item": [1, 2]}, "needs one entry in both"),
        ({"user__behavior_age": [1, 2]}, "user.behavior_age has 2 entries, and behavior_item has 3 there"),
        ({"user__behavior_album": [["a.jpg"], [], 4]}, "user.behavior_album[2] is 4, and has to be a list of lists of"),
        ({"user__behavior_album": [["a.jpg"], [[]], []]}, "user.behavior_album[1][0] is [], and has to be a whole"),
        ({"user__ad_item": [5, 6]}, "user.ad_item is a column of side ad; put it into candidates, or into context"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as error:
        decode_requests(COLUMNS, [request(**changes)])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_which_of_several_requests_is_named() -> None:
    with pytest.raises(RequestError, match=r"^requests\[1\]: candidates.ad_item\[1\] is null"):
        decode_requests(COLUMNS, [request(), request(candidates__ad_item=[5, None])])
    with pytest.raises(RequestError, match=r"^requests\[1\]: context.ad_scene is null"):
        decode_requests(COLUMNS, [request(), request(context__ad_scene=None)])
    with pytest.raises(RequestError, match=r"^requests\[2\]: user.behavior_image\[1\] is 1.5"):
        decode_requests(COLUMNS, [request(), request(), request(user__behavior_image=[1, 1.5, 2])])


def test_roles_are_ignored_wherever_they_are() -> None:
    expected = decode_requests(COLUMNS, [request()]).batch
    found = decode_requests(COLUMNS, [request(candidates__label=[0, 1], user__timestamp=7, context__label=None)]).batch
    np.testing.assert_array_equal(found.fields["ad_item"].values_N, expected.fields["ad_item"].values_N)


def test_null_images_are_missing_and_have_key_zero() -> None:
    decoded = decode_requests(COLUMNS, [request(), request(user__behavior_image=["a.jpg", 7, 8])])
    assert {name: np.flatnonzero(mask).tolist() for name, mask in decoded.nulls.items()} == {
        "behavior_image": [2],
        "ad_image": [1, 3],
    }
    assert decoded.batch.fields["ad_image"].values_N[[1, 3]].tolist() == [0, 0]


def test_null_images_of_tables_are_missing_too() -> None:
    texts = frozenset({"user", "behavior_shop", "behavior_image", "behavior_album", "ad_image", "ad_album"})
    row = {**ROW, "behavior_image": ["a.jpg", "7", None]}
    decoded = decode_table(COLUMNS, table_of([row, row], texts))
    expected = decode_requests(COLUMNS, [Request(**parts(scene=False))] * 2)
    for name, mask in decoded.nulls.items():
        np.testing.assert_array_equal(mask, expected.nulls[name])
    np.testing.assert_array_equal(
        decoded.batch.fields["ad_image"].values_N[[0, 2]], expected.batch.fields["ad_image"].values_N[[0, 2]]
    )


@pytest.mark.parametrize("candidates", [{}, {"ad_item": []}, {name: [] for name in ROW if name.startswith("ad_")}])
def test_no_candidates_are_no_error(candidates: dict[str, Any]) -> None:
    empty = Request(user=parts()["user"], candidates=candidates)
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
        columns = data.draw(st.sampled_from(made))[data.draw(st.sampled_from(["user", "context", "candidates"]))]
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
