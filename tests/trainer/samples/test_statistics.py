"""What is measured on all training samples, once: statistics, the same bits for any ranks, and digests."""

import contextlib
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore.storage import storage
from featurestore.storage.storage import Storage
from tests.cli import invoke
from tests.raised import raises
from tests.trainer.checkpoints import differs
from tests.trainer.conftest import Places, change_column, make_places
from tests.trainer.runs.saved import on_ranks
from tests.trainer.samples.reading import rewrite, with_every_kind
from tests.trainer.whole_runs import report_of, run_alone
from trainer.comm import SoloComm
from trainer.config import load_config
from trainer.errors import CheckpointError, DataError
from trainer.evaluate import app as evaluate
from trainer.problems import Problem
from trainer.runs import checkpoint
from trainer.runs.folder import finished
from trainer.runs.open import open_run
from trainer.runs.saved import open_trained
from trainer.samples import survey
from trainer.samples.index import SampleIndex, open_index
from trainer.samples.survey import (
    FOUND,
    fields_to_measure,
    fill_in,
    measure,
    part_of,
    quantile_boundaries,
    samples_digest,
    with_statistics,
)
from trainer.schema.fields import Field, Schema, load_schema, schema_text

NUMBERS = (
    Field(name="income", side="user", kind="dense", transform="log_standardize", fill="mean"),
    Field(name="place", side="user", kind="dense", width=2, transform="standardize"),
    Field(name="same", side="user", kind="dense", transform="standardize"),
    Field(name="ad_price", side="ad", kind="dense", transform="log_standardize"),
    Field(name="ad_price_bucket", side="ad", kind="id", column="ad_price", buckets=8),
    Field(name="ad_rating", side="ad", kind="id", buckets=5, fill="bucket"),
)
SCHEMA = Schema(fields=(*load_schema().fields, *NUMBERS))


@pytest.fixture(scope="session")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Places whose samples have these columns; schema.yaml is theirs."""
    places = make_places(tmp_path_factory.mktemp("numbered"))
    rewrite(places.folder / "samples", with_every_kind)
    (places.folder / "schema.yaml").write_text(schema_text(SCHEMA))
    return places


@pytest.fixture(scope="module")
def index(numbered: Places) -> SampleIndex:
    return open_index(SoloComm(), str(numbered.folder / "samples"), "train", SCHEMA)


def test_equal_to_numpy_over_all_values_and_buckets_equally_full(numbered: Places, index: SampleIndex) -> None:
    """Over values as float32 reads them."""
    table = pq.read_table(numbered.folder / "samples/train", partitioning=None)
    flat = {name: np.hstack(table[name].to_pylist()) for name in ("income", "place", "ad_price", "ad_rating")}
    columns = {name: values.astype(np.float32).astype(np.float64) for name, values in flat.items()}
    schema = fill_in(SCHEMA, measure(SoloComm(), index, SCHEMA))
    assert not fields_to_measure(schema)
    fields = {field.name: field for field in schema.fields}
    income = np.log1p(columns["income"][~np.isnan(columns["income"])])
    assert len(income) < len(columns["income"])
    place = columns["place"].reshape(-1, 2)
    for name, values in (("income", income[:, None]), ("place", place)):
        np.testing.assert_allclose(fields[name].mean, values.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(fields[name].std, values.std(axis=0), rtol=1e-12)
    assert fields["same"].std == (1.0,)
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


def test_one_sample_has_statistics_where_it_has_a_number(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    ad = Field(name="ad", side="ad", kind="id")
    x = Field(name="x", side="user", kind="dense", transform="standardize")
    bucket = Field(name="b", side="user", kind="id", column="x", buckets=4)

    def measured(value: float | None, *fields: Field) -> tuple[Field, ...]:
        table = pa.table({"user": [1], "x": pa.array([value], pa.float32()), "label": [[1]], "ad": [[5]]})
        pq.write_table(table, tmp_path / "train" / "a.parquet")
        schema = Schema(fields=(ad, *fields), new_ad_field="ad")
        index = open_index(SoloComm(), str(tmp_path), "train", schema)
        return fill_in(schema, measure(SoloComm(), index, schema)).fields

    _, found, buckets = measured(0.1, x, bucket)
    assert (found.mean, found.std, buckets.boundaries) == ((float(np.float32(0.1)),), (1.0,), ())
    with raises(DataError, Problem.NULL_IN_COLUMN, where=f"{tmp_path}/train/a.parquet, row 0", column="x"):
        measured(None, x)
    with raises(DataError, Problem.NO_NUMBERS, where="x", column="x", lacking="mean"):
        measured(None, x.model_copy(update={"fill": "mean"}))


def with_buckets(number: int) -> Schema:
    """The schema with so many buckets of prices, which are eight."""
    fields = tuple(f.model_copy(update={"buckets": number}) if f.buckets == 8 else f for f in SCHEMA.fields)
    return SCHEMA.model_copy(update={"fields": fields})


def test_they_are_measured_once(index: SampleIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(survey, "measure", lambda *arguments: calls.append(1) or measure(*arguments))

    def filled(schema: Schema, digest: str) -> Schema:
        return with_statistics(SoloComm(), index, schema, digest, str(tmp_path))

    first = filled(SCHEMA, "digest")
    assert filled(SCHEMA, "digest") == first and not fields_to_measure(first)
    assert len(calls) == 1
    filled(SCHEMA, "other samples")
    filled(with_buckets(6), "digest")
    assert len(calls) == 3
    assert filled(first, "new") is first
    assert len(calls) == 3


def test_only_what_was_declared_the_same_is_taken_over() -> None:
    field = Field(name="x", side="ad", kind="dense", transform="standardize")
    theirs = {"x": {"kind": "dense", "transform": "standardize", "mean": [1.0], "std": [2.0]}}
    (filled,) = fill_in(Schema(fields=(field,)), theirs).fields
    assert (filled.mean, filled.std) == ((1.0,), (2.0,))
    theirs["x"]["transform"] = "log_standardize"
    assert fill_in(Schema(fields=(field,)), theirs).fields == (field,)
    given = field.model_copy(update={"mean": (9.0,), "std": (3.0,)})
    assert fill_in(Schema(fields=(given,)), theirs).fields == (given,)


def trained(places: Places, name: str, **changes: Any) -> Path:
    common = {"model__base": "two_tower", "model__images": "none", "model__compute_dtype": "float32"}
    common |= {"train__max_steps": 8, "data__schema_file": places.folder / "schema.yaml"}
    return run_alone(places, run__name=name, **common | changes)


def fields_of(run: Path) -> dict[str, Any]:
    return checkpoint.read_state(finished(run)[-1]).origin.model["fields"]


@pytest.fixture(scope="module")
def run(numbered: Places) -> Path:
    return trained(numbered, "two")


def test_a_run_keeps_them_in_its_checkpoint(run: Path) -> None:
    found, report = fields_of(run), report_of(run)
    assert {name for name, values in found.items() if values.keys() & set(FOUND)} == {field.name for field in NUMBERS}
    assert np.isfinite(report["metrics"]["logloss"])
    assert not {"ad_price_bucket", "ad_rating"} & set(report["tables"])  # nothing shares a row there


def test_it_goes_on_by_those_of_the_checkpoint(run: Path, numbered: Places) -> None:
    trained(numbered, "two", run__resume="latest", train__max_steps=10)
    assert report_of(run)["global_step"] == 10
    other = run.parent / "schema-16.yaml"
    other.write_text(schema_text(with_buckets(16)))
    differing = differs("model.fields.ad_price_bucket.buckets", 16, other=8)
    with raises(CheckpointError, Problem.CHECKPOINT_OF_OTHER_RUN, differing=differing):
        trained(numbered, "two", run__resume="latest", train__max_steps=12, data__schema_file=other)


def test_a_warm_start_takes_them_over(run: Path, numbered: Places, tmp_path: Path) -> None:
    """Its layers have learned the earlier run's scale, and the samples of another day have another one."""
    samples = shutil.copytree(numbered.folder / "samples", tmp_path / "samples")
    for path in samples.glob("*/*"):
        change_column(path, "ad_price", lambda rows: [[2 * price for price in row] for row in rows])
    common = {"data__samples": samples, "run__dir": tmp_path / "runs"}
    assert fields_of(trained(numbered, "warm", **common, run__warm_start=run)) == fields_of(run)
    cold = trained(numbered, "cold", **common)
    assert fields_of(cold)["ad_price"]["mean"][0] > fields_of(run)["ad_price"]["mean"][0] + 0.3


def test_evaluation_takes_them_of_the_checkpoint(run: Path, numbered: Places, tmp_path: Path) -> None:
    """Of other samples than those of training, which have another scale."""
    samples = tmp_path / "samples/test"
    samples.mkdir(parents=True)
    for path in (numbered.folder / "samples/test").glob("*"):
        pq.write_table(pq.read_table(path, partitioning=None).slice(0, 20), samples / path.name)
    invoke(evaluate, run, "--samples", tmp_path / "samples", "--bootstrap", "20", code=0)
    with contextlib.closing(open_trained(run, SoloComm())) as trained:
        assert trained.schema.fields == fill_in(SCHEMA, fields_of(run)).fields


OLD_S = 1_000_000_000
FIRST = "day=2026-01-01.parquet"


def turn_labels(file: Path) -> None:
    """Every label the other way round, written as a person would: the metadata are copied, rows and groups stay."""
    before = pq.ParquetFile(file).metadata
    change_column(file, "label", lambda rows: [[1 - label for label in row] for row in rows])
    after = pq.ParquetFile(file).metadata
    assert (after.num_rows, after.num_row_groups) == (before.num_rows, before.num_row_groups)


def test_a_resume_with_turned_labels_is_refused(tmp_path: Path) -> None:
    mine, again = make_places(tmp_path), {"run__name": "r", "run__resume": "latest", "train__max_steps": 4}
    run_alone(mine, run__name="r", train__max_steps=3)
    open_run(load_config(settings=mine.settings(**again)), SoloComm()).close()
    for file in (tmp_path / "samples" / "train").iterdir():
        turn_labels(file)
    digest = re.compile(r"'\w+'")
    differing = differs("data.samples_digest", digest, other=digest)
    with raises(CheckpointError, Problem.CHECKPOINT_OF_OTHER_RUN, differing=differing):
        run_alone(mine, **again)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Samples of long ago."""
    folder = make_places(tmp_path).folder / "samples"
    for file in folder.glob("*/*.parquet"):
        os.utime(file, (OLD_S, OLD_S))
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read, in order."""
    files: list[str] = []
    work = survey.digest_of
    monkeypatch.setattr(survey, "digest_of", lambda storage, file: files.append(file) or work(storage, file))
    return files


def digest(samples: str | Path, memory: Path) -> str:
    comm = SoloComm()
    return samples_digest(comm, open_index(comm, str(samples), "train", load_schema()), memory)


def test_known_files_are_read_once_where_no_other_may_write(samples: Path, read: list[str], tmp_path: Path) -> None:
    """Whatever the umask: what this user keeps is for this user alone."""
    before = os.umask(0)
    try:
        first = digest(samples, tmp_path / "c")
    finally:
        os.umask(before)
    assert sorted(read) == [f"train/day=2026-01-0{day}.parquet" for day in (1, 2, 3)]
    (kept,) = (tmp_path / "c" / "samples").iterdir()
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "c", kept.parent, kept)] == [0o700, 0o700, 0o600]
    for mode, again in ((0o600, 0), (0o660, 3)):
        kept.chmod(mode)
        del read[:]
        assert digest(samples, tmp_path / "c") == first
        assert len(read) == again
    assert digest(samples, tmp_path / "other") == first


def test_a_changed_file_of_the_same_size_and_time_is_read(samples: Path, read: list[str], tmp_path: Path) -> None:
    first = digest(samples, tmp_path / "c")
    file = samples / "train" / FIRST
    data = bytearray(file.read_bytes())
    data[len(data) // 4] ^= 1
    file.write_bytes(data)
    os.utime(file, (OLD_S, OLD_S))
    del read[:]
    assert digest(samples, tmp_path / "c") != first
    assert read == [f"train/{FIRST}"]


def test_a_file_of_this_moment_is_not_remembered(samples: Path, read: list[str], tmp_path: Path) -> None:
    os.utime(samples / "train" / FIRST)
    for _ in range(2):
        digest(samples, tmp_path / "c")
    assert read.count(f"train/{FIRST}") == 2 and len(read) == 4


def test_a_place_that_cannot_remember_does_no_harm(samples: Path, tmp_path: Path) -> None:
    first = digest(samples, tmp_path / "c")
    (memory,) = (tmp_path / "c" / "samples").iterdir()
    for text in ("", "[1]", '{"train/a": 1}', "\x00"):
        memory.write_text(text)
        assert digest(samples, tmp_path / "c") == first
    (tmp_path / "file").touch()
    assert digest(samples, tmp_path / "file") == first


def test_an_object_store_says_the_same_and_is_read_once(
    samples: Path, read: list[str], tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_SETTLED_S", -60.0)
    there = Storage(s3_url)
    for file in samples.glob("*/*.parquet"):
        there.write_bytes(f"{file.parent.name}/{file.name}", file.read_bytes())
    expected = digest(samples, tmp_path / "c")
    for number in (6, 6):
        assert digest(s3_url, tmp_path / "c") == expected
        assert len(read) == number
    local = Path(shutil.copy(samples / "train" / FIRST, tmp_path))
    turn_labels(local)
    there.write_bytes(f"train/{FIRST}", local.read_bytes())
    assert digest(s3_url, tmp_path / "c") != expected
    assert len(read) == 7
