"""Statistics of the training samples: equal to numpy's over all values, the same bits for any ranks, hard cases."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.trainer.runs.saved import on_ranks
from tests.trainer.samples.conftest import SCHEMA
from trainer.comm import SoloComm
from trainer.errors import DataError
from trainer.samples import survey
from trainer.samples.index import SampleIndex, open_index
from trainer.samples.survey import (
    fields_to_measure,
    fill_in,
    measure,
    part_of,
    quantile_boundaries,
    with_statistics,
)
from trainer.schema import Field, Schema

TRAIN = "train"


@pytest.fixture(scope="module")
def index(numbered: Any) -> SampleIndex:
    return open_index(SoloComm(), str(numbered.folder / "samples"), TRAIN, SCHEMA)


@pytest.fixture(scope="module")
def columns(numbered: Any) -> dict[str, np.ndarray]:
    """All values of a column in training, as float32 reads them."""
    tables = [pq.read_table(path, partitioning=None) for path in sorted(numbered.folder.glob("samples/train/*"))]

    def flat(name: str) -> np.ndarray:
        array: Any = pa.concat_tables(tables).column(name).combine_chunks()
        while hasattr(array, "flatten") and pa.types.is_nested(array.type):
            array = array.flatten()
        return array.to_numpy(zero_copy_only=False).astype(np.float32).astype(np.float64)

    return {name: flat(name) for name in ("income", "place", "same", "ad_price", "ad_rating")}


def by_name(schema: Schema) -> dict[str, Field]:
    return {field.name: field for field in schema.fields}


def test_equal_to_numpy_over_all_values(index: SampleIndex, columns: dict[str, np.ndarray]) -> None:
    fields = by_name(fill_in(SCHEMA, measure(SoloComm(), index, SCHEMA)))
    income = np.log1p(columns["income"][~np.isnan(columns["income"])])
    assert len(income) < len(columns["income"])
    np.testing.assert_allclose(
        [*fields["income"].mean, *fields["income"].std], [income.mean(), income.std()], rtol=1e-12
    )
    place = columns["place"].reshape(-1, 2)
    np.testing.assert_allclose(fields["place"].mean, place.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(fields["place"].std, place.std(axis=0), rtol=1e-12)
    assert fields["same"].std == (1.0,)
    assert not fields_to_measure(Schema(fields=tuple(fields.values())))


def test_buckets_are_equally_full(index: SampleIndex, columns: dict[str, np.ndarray]) -> None:
    fields = by_name(fill_in(SCHEMA, measure(SoloComm(), index, SCHEMA)))
    starts = np.array(fields["ad_price_bucket"].boundaries)
    values = np.sort(columns["ad_price"])
    expected = np.unique([values[len(values) * n // 8] for n in range(1, 8)])
    np.testing.assert_array_equal(starts, expected)
    full = np.bincount(np.searchsorted(starts, values, side="right"), minlength=8) / len(values)
    assert full.max() < 0.22  # one price is 3 % of the impressions at most
    rating = columns["ad_rating"]
    assert set(fields["ad_rating"].boundaries) <= set(rating[~np.isnan(rating)])


def test_the_same_bits_for_any_number_of_ranks(index: SampleIndex) -> None:
    alone = measure(SoloComm(), index, SCHEMA)
    assert len(index.row_groups) > 20
    for size in (2, 3, 7):
        assert on_ranks(size, lambda comm: measure(comm, index, SCHEMA)) == [alone] * size
    more_ranks_than_row_groups = replace(index, row_groups=index.row_groups[:2])
    few = measure(SoloComm(), more_ranks_than_row_groups, SCHEMA)
    assert on_ranks(3, lambda comm: measure(comm, more_ranks_than_row_groups, SCHEMA)) == [few] * 3


def test_quantiles_of_more_values_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    field = Field(name="x", side="ad", kind="id", buckets=10)
    values = np.random.default_rng(0).lognormal(3, 2, 50_000).astype(np.float32)
    parts = [part_of(field, chunk, 200) for chunk in np.array_split(values, 13)]
    merged = survey.NumberSums.of_all(parts)
    assert len(merged.kept_S) == 2_600
    assert merged.counts_S.sum() == pytest.approx(50_000)
    starts = quantile_boundaries(merged, 10)
    share = np.bincount(np.searchsorted(starts, values, side="right"), minlength=10) / len(values)
    np.testing.assert_allclose(share, 0.1, atol=0.003)


@pytest.mark.parametrize(("values", "expected"), [([4.0], ()), ([1.0] * 9, ()), ([1.0] * 8 + [2.0, 3.0], (2.0,))])
def test_few_different_values_make_fewer_buckets(values: list[float], expected: tuple[float, ...]) -> None:
    field = Field(name="x", side="ad", kind="id", buckets=4)
    starts = quantile_boundaries(part_of(field, np.array(values, np.float32), 100), 4)
    assert all(start > 1.0 for start in starts)
    assert len(starts) <= len(expected) + 1


def test_one_sample_and_constants_do_not_blow_up(tmp_path: Path) -> None:
    (tmp_path / TRAIN).mkdir()
    pq.write_table(pa.table({"user": [1], "x": [0.1], "label": [[1]], "ad": [[5]]}), tmp_path / TRAIN / "a.parquet")
    fields = (
        Field(name="ad", side="ad", kind="id"), Field(name="x", side="user", kind="dense", transform="standardize"),
        Field(name="b", side="user", kind="id", column="x", buckets=4),
    )  # fmt: skip
    schema = Schema(fields=fields, new_ad_field="ad")
    index = open_index(SoloComm(), str(tmp_path), TRAIN, schema)
    x, b = fill_in(schema, measure(SoloComm(), index, schema)).fields[1:]
    assert (x.mean, x.std, b.boundaries) == ((float(np.float32(0.1)),), (1.0,), ())


def test_a_column_without_a_number_is_told(tmp_path: Path) -> None:
    (tmp_path / TRAIN).mkdir()
    table = pa.table({"user": [1], "x": pa.array([None], pa.float32()), "label": [[1]], "ad": [[5]]})
    pq.write_table(table, tmp_path / TRAIN / "a.parquet")
    ad = Field(name="ad", side="ad", kind="id")
    lenient = Field(name="x", side="user", kind="dense", transform="standardize", fill="mean")
    schema = Schema(fields=(ad, lenient), new_ad_field="ad")
    index = open_index(SoloComm(), str(tmp_path), TRAIN, schema)
    with pytest.raises(DataError, match="field x: column x has no number in the training samples"):
        measure(SoloComm(), index, schema)
    strict = Schema(fields=(ad, lenient.model_copy(update={"fill": None})), new_ad_field="ad")
    with pytest.raises(DataError, match=r"a\.parquet, row 0: column x is null"):
        measure(SoloComm(), index, strict)


class TestRemembered:
    def test_they_are_measured_once(self, index: SampleIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []

        def counted(*arguments: Any) -> Any:
            calls.append(1)
            return measure(*arguments)

        monkeypatch.setattr(survey, "measure", counted)
        first = with_statistics(SoloComm(), index, SCHEMA, "digest", str(tmp_path))
        assert with_statistics(SoloComm(), index, SCHEMA, "digest", str(tmp_path)) == first
        assert not fields_to_measure(first)
        assert len(calls) == 1
        with_statistics(SoloComm(), index, SCHEMA, "other samples", str(tmp_path))
        more = SCHEMA.model_copy(
            update={
                "fields": tuple(f.model_copy(update={"buckets": 6}) if f.buckets == 8 else f for f in SCHEMA.fields)
            }
        )
        with_statistics(SoloComm(), index, more, "digest", str(tmp_path))
        assert len(calls) == 3
        assert with_statistics(SoloComm(), index, first, "new", str(tmp_path)) is first
        assert len(calls) == 3

    def test_what_cannot_be_kept_is_measured_again(self, index: SampleIndex, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("a file in the place of the folder")
        found = with_statistics(SoloComm(), index, SCHEMA, "digest", str(tmp_path / "cache"))
        assert not fields_to_measure(found)


def test_only_what_was_declared_the_same_is_taken_over() -> None:
    field = Field(name="x", side="ad", kind="dense", transform="standardize")
    theirs = {"x": {"kind": "dense", "transform": "standardize", "mean": [1.0], "std": [2.0]}}
    (filled,) = fill_in(Schema(fields=(field,)), theirs).fields
    assert (filled.mean, filled.std) == ((1.0,), (2.0,))
    theirs["x"]["transform"] = "log_standardize"
    assert fill_in(Schema(fields=(field,)), theirs).fields == (field,)
    given = field.model_copy(update={"mean": (9.0,), "std": (3.0,)})
    assert fill_in(Schema(fields=(given,)), theirs).fields == (given,)
