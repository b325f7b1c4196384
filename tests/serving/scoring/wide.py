"""A schema with a field of every kind, and groups of samples for it as Python values, drawn by hypothesis."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

from serving.network import run_steps
from serving.scoring.decode import Decoded, decode
from serving.scoring.request import Request, RequestColumns
from serving.scoring.sent import SentTable, sent_requests, sent_table
from trainer.schema.fields import Field, Schema

STANDARDIZED = {"transform": "standardize", "mean": [0.5], "std": [0.25]}
SCHEMA = Schema(
    fields=tuple(
        Field(**each)
        for each in [
            {"name": "user", "side": "user", "kind": "id"},
            {"name": "user_age", "side": "user", "kind": "id", "buckets": "log2", "fill": "bucket"},
            {"name": "user_size", "side": "user", "kind": "dense", "fill": 1.5, **STANDARDIZED},
            {"name": "user_tags", "side": "user", "kind": "multi_id", "weights": "user_tag_weights"},
            {"name": "behavior_item", "side": "user", "kind": "multi_id", "table": "item"},
            {"name": "behavior_age", "side": "user", "kind": "multi_id", "buckets": "log2", "beside": "behavior_item"},
            {"name": "behavior_both", "side": "user", "kind": "multi_id"}
            | {"columns": ["behavior_item", "behavior_shop"]},
            {"name": "behavior_image_id", "side": "user", "kind": "multi_id", "column": "behavior_image"},
            {"name": "behavior_image", "side": "user", "kind": "content"},
            {"name": "ad_item", "side": "ad", "kind": "id", "table": "item"},
            {"name": "ad_scene", "side": "ad", "kind": "id", "context": True},
            {"name": "ad_scene_item", "side": "ad", "kind": "id", "columns": ["ad_scene", "ad_item"]},
            {"name": "ad_shops", "side": "ad", "kind": "multi_id", "weights": "ad_shop_weights"},
            {"name": "ad_price", "side": "ad", "kind": "dense"},
            {"name": "ad_shape", "side": "ad", "kind": "dense", "width": 2},
            {"name": "ad_price_bucket", "side": "ad", "kind": "id", "column": "ad_price", "boundaries": [0.0, 0.7]},
            {"name": "ad_image", "side": "ad", "kind": "content"},
        ]
    )
)
TEXTS = st.sampled_from(["7", "-3", " 12 ", "007", "sku-17", "größe", "", "9" * 19, "a\x00b", "\u2003x"]) | st.text(
    max_size=3
)
IDS = st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3)
REALS = (
    st.floats(-(2.0**99), 2.0**99, allow_subnormal=False) | st.integers(-(2**40), 2**40) | st.sampled_from([0, 0.7, 2])
)


def lists(values: Any, size: int) -> Any:
    return st.lists(values, min_size=size, max_size=size)


@st.composite
def groups(draw: Any, *, in_texts: frozenset[str]) -> dict[str, Any]:
    """A group as a sample file has it; columns `in_texts` have strings."""

    def ids(column: str) -> Any:
        return TEXTS if column in in_texts else IDS

    behaviors, shown, tags = draw(st.integers(0, 3)), draw(st.integers(1, 4)), draw(st.integers(0, 2))
    shops = draw(lists(st.integers(0, 2), shown))
    return {
        "user": draw(ids("user")),
        "user_age": draw(st.none() | REALS),
        "user_size": draw(st.none() | REALS),
        "user_tags": draw(lists(ids("user_tags"), tags)),
        "user_tag_weights": draw(lists(REALS, tags)),
        "behavior_item": draw(lists(ids("behavior_item"), behaviors)),
        "behavior_age": draw(lists(REALS, behaviors)),
        "behavior_shop": draw(lists(ids("behavior_shop"), behaviors)),
        "behavior_image": draw(lists(ids("behavior_image"), behaviors)),
        "ad_item": draw(lists(ids("ad_item"), shown)),
        "ad_scene": [draw(ids("ad_scene"))] * shown,
        "ad_shops": [draw(lists(ids("ad_shops"), size)) for size in shops],
        "ad_shop_weights": [draw(lists(REALS, size)) for size in shops],
        "ad_price": draw(lists(REALS, shown)),
        "ad_shape": draw(lists(lists(REALS, 2), shown)),
        "ad_image": draw(lists(ids("ad_image"), shown)),
        "label": [0] * shown,
    }


LISTS = {"user_tags": 1, "user_tag_weights": 1, "ad_shops": 2, "ad_shop_weights": 2, "ad_shape": 2}
LISTS |= {"user": 0, "user_age": 0, "user_size": 0}
NUMBERS = {"user_age", "user_size", "user_tag_weights", "behavior_age", "ad_shop_weights", "ad_price", "ad_shape"}


def table_of(rows: Sequence[Mapping[str, Any]], in_texts: frozenset[str]) -> pa.Table:
    """The table of a sample file with these groups."""
    columns = {}
    for name in rows[0]:
        kind: Any = pa.string() if name in in_texts else pa.float64() if name in NUMBERS else pa.int64()
        for _ in range(LISTS.get(name, 1)):
            kind = pa.list_(kind)
        columns[name] = pa.array([row[name] for row in rows], kind)
    return pa.table(columns)


def request_of(row: Mapping[str, Any], *, scene_in_context: bool) -> Request:
    ads = {name: values for name, values in row.items() if name.startswith("ad_")}
    context = {"ad_scene": ads.pop("ad_scene")[0]} if scene_in_context else {}
    user = {name: values for name, values in row.items() if not name.startswith("ad_") and name != "label"}
    return Request(user=user, context=context, candidates=ads)


COLUMNS = RequestColumns(SCHEMA, SCHEMA.fields)


def sent_of(body: Sequence[Request] | pa.Table) -> SentTable:
    return run_steps(sent_table(COLUMNS, body) if isinstance(body, pa.Table) else sent_requests(COLUMNS, body))


def decoded(body: Sequence[Request] | pa.Table) -> Decoded:
    return run_steps(decode(COLUMNS, sent_of(body)))
