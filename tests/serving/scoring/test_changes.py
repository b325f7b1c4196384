"""Requests that are drawn where a bundle has no sample fit every kind of column."""

import numpy as np
import pytest

from serving.scoring.decode import decode_requests
from serving.scoring.drift import drawn_requests
from serving.scoring.request import RequestColumns
from tests.trainer.equivalence.scenarios import BUCKETS, SCHEMA, Scenario
from trainer.schema import Field, Schema

PRICE = Field(name="ad_price", side="ad", kind="dense", transform="standardize", mean=(0.0,), std=(1.0,))
NUMBERS = Schema(fields=(*(field for field in SCHEMA.fields if field.name != "ad_price"), PRICE, *BUCKETS))


@pytest.mark.parametrize(
    "schema",
    [
        SCHEMA,
        Scenario({}, texts=True).schema,
        Scenario({}, words=True).schema,
        Scenario({}, gallery="mean").schema,
        Scenario({}, weighted=True).schema,
        NUMBERS,
    ],
    ids=["plain", "texts", "crossed", "galleries", "weights", "numbers"],
)
def test_drawn_requests_are_decoded(schema: Schema) -> None:
    columns = RequestColumns(schema, schema.fields)
    requests = drawn_requests(columns.sources)
    batch = decode_requests(columns, requests).batch
    assert batch.num_samples == 8 * len(requests) == 512
    for field in schema.of_kind("id", "multi_id"):
        if not field.is_bucketed:
            values = batch.fields[field.name].values_N
            assert len(np.unique(values)) == len(values)
