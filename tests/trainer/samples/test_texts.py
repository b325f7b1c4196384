"""Texts and crossed columns as IDs: the same numbers whatever Arrow type they come in, and what is refused."""

import json
import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore.keys import key_of_uri
from featurestore.published.paths import RunPath, run_path
from featurestore.storage.storage import Storage
from pipeline.samples.mapping import parse_ids
from tests.cli import invoke
from tests.raised import raises, told
from tests.trainer.conftest import Places, make_places, sample_table
from tests.trainer.runs.saved import on_ranks
from tests.trainer.samples.reading import hashed, reader_of, replaced, rewrite, written
from tests.trainer.whole_runs import run_alone
from trainer.comm import SoloComm
from trainer.errors import DataError
from trainer.problems import Problem
from trainer.runs.folder import find_checkpoint, finished
from trainer.samples import columns, survey
from trainer.samples.columns import rules_of
from trainer.samples.index import known_ads, open_index
from trainer.samples.reader import Batch
from trainer.samples.survey import IdDictionary, write_dictionary
from trainer.schema.__main__ import app
from trainer.schema.fields import DEFAULT_SCHEMA, IDS_FILE, Field, Schema, load_schema

SCHEMA = load_schema()
COLUMNS = ("user", "ad_item", "behavior_item", "ad_image", "behavior_image", "ad_scene")
KINDS = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]


def read(folder: Path, table: pa.Table, schema: Schema = SCHEMA) -> Batch:
    """All of a table as one batch."""
    (folder / "train").mkdir(parents=True)
    pq.write_table(table, folder / "train" / "a.parquet", row_group_size=4)
    (batch,) = reader_of(folder, schema=schema, batch_size=1000, seed=None).batches()
    return batch


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_any_type_are_their_hash(kind: Any, tmp_path: Path) -> None:
    numbers = replaced(sample_table(9), COLUMNS, pa.int64(), lambda column, n: hashed(written(column, n)))
    expected = read(tmp_path / "numbers", numbers)
    found = read(tmp_path / "texts", replaced(sample_table(9), COLUMNS, kind, written))
    for name, field in expected.fields.items():
        np.testing.assert_array_equal(found.fields[name].values_N, field.values_N, name)
        np.testing.assert_array_equal(found.fields[name].lengths_M, field.lengths_M, name)
    np.testing.assert_array_equal(found.group_id_B, expected.group_id_B)


def test_build_samples_makes_the_same_ids(tmp_path: Path) -> None:
    """A uri is hashed also where it is a number."""
    texts = ["7", "-7", " 7 ", "07", "+7", "9223372036854775807", "9223372036854775808", "", "ü", "1٢", "nan"]
    table = sample_table(len(texts)).set_column(0, "user", pa.array(texts))
    table = replaced(table, ("ad_image",), pa.string(), lambda column, number: str(number))
    batch = read(tmp_path, table)
    found = batch.fields["user"].values_N.tolist()
    assert found == parse_ids(pa.chunked_array([texts]))[0].tolist()
    assert found[:3] == [7, -7, 7] and found[5] == 2**63 - 1
    assert found[3:5] + found[6:] == [hashed(text) for text in texts[3:5] + texts[6:]]
    keys = [key_of_uri(text) for row in table["ad_image"].to_pylist() for text in row]
    assert batch.fields["ad_image"].values_N.tolist() == batch.fields["ad_image_id"].values_N.tolist() == keys


CROSSED = Schema(
    fields=(
        Field(name="ad_item", side="ad", kind="id"),
        Field(name="ad_pair", side="ad", kind="id", columns=("ad_item", "ad_scene")),
        Field(name="behavior_pair", side="user", kind="multi_id", columns=("behavior_item", "behavior_category")),
    )
)


@pytest.mark.parametrize("texts", [(), ("ad_item", "behavior_category"), ("ad_item", "ad_scene")])
def test_crossed_columns(texts: tuple[str, ...], tmp_path: Path) -> None:
    table = replaced(sample_table(9), texts, pa.string(), written)
    batch = read(tmp_path, table, CROSSED)

    def pairs(first: str, second: str) -> list[int]:
        rows = zip(table[first].to_pylist(), table[second].to_pylist(), strict=True)
        values = [list(pair) for row in rows for pair in zip(*row, strict=True)]
        return [hashed(json.dumps(pair, ensure_ascii=False, separators=(",", ":"))) for pair in values]

    assert batch.fields["ad_pair"].values_N.tolist() == pairs("ad_item", "ad_scene")
    assert batch.fields["behavior_pair"].values_N.tolist() == pairs("behavior_item", "behavior_category")
    assert set(batch.fields["ad_pair"].lengths_M) == {1}
    index = open_index(SoloComm(), str(tmp_path), "train", CROSSED)
    found = known_ads(SoloComm(), index, CROSSED.model_copy(update={"new_ad_field": "ad_pair"}))
    assert found.tolist() == sorted(set(pairs("ad_item", "ad_scene")))


def test_no_two_tuples_are_one_id(tmp_path: Path) -> None:
    first, second = ["a,b", "a", 'a","b', "1"], ["c", "b,c", "c", "1"]
    table = sample_table(4).append_column("first", pa.array(first)).append_column("second", pa.array(second))
    schema = Schema(fields=(Field(name="pair", side="user", kind="id", columns=("first", "second")),))
    expected = ['["a,b","c"]', '["a","b,c"]', '["a\\",\\"b","c"]', "[1,1]"]
    assert read(tmp_path, table, schema).fields["pair"].values_N.tolist() == [hashed(text) for text in expected]


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    users = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    with raises(DataError, Problem.NOT_UTF8, where=re.compile(r"/a\.parquet: column user$")):
        read(tmp_path, sample_table(3).set_column(0, "user", users))


OF_TEXTS = ("user", "ad_item", "behavior_item", "ad_scene")
CROSSED_FIELD = "  - {name: pair, side: ad, kind: id, table: item, columns: [ad_item, ad_category]}\n"
as_texts = partial(replaced, columns=OF_TEXTS, kind=pa.string(), value=written)
as_numbers = partial(replaced, columns=OF_TEXTS, kind=pa.int64(), value=lambda _, text: hashed(str(text)))


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Places whose samples have texts, and a schema that crosses two columns."""
    places = make_places(tmp_path_factory.mktemp("wordy"))
    rewrite(places.folder / "samples", as_texts)
    (places.folder / "schema.yaml").write_text(DEFAULT_SCHEMA.read_text() + CROSSED_FIELD)
    return places


def train_on(places: Places, **changes: Any) -> Path:
    """A run of one rank."""
    return run_alone(places, **{"data__schema_file": places.folder / "schema.yaml", "train__max_steps": 2, **changes})


@pytest.fixture(scope="module")
def run(wordy: Places) -> Path:
    return train_on(wordy, run__name="alone")


def expected(places: Places) -> dict[int, str]:
    found = set()
    for row in pq.read_table(places.folder / "samples/train", partitioning=None).to_pylist():
        found |= {row["user"], *row["ad_item"], *row["behavior_item"], *row["ad_scene"]}
        found |= {f'["{item}",{n}]' for item, n in zip(row["ad_item"], row["ad_category"], strict=True)}
    return {hashed(text): text for text in found}


def entries(folder: Path) -> dict[int, str]:
    table = pq.read_table(folder / IDS_FILE)
    ids = table["id"].to_pylist()
    assert ids == sorted(set(ids))
    return dict(zip(ids, table["text"].to_pylist(), strict=True))


@pytest.mark.long
def test_ranks_without_a_shared_disk_write_the_same_bytes_to_s3(run: Path, wordy: Places, s3_url: str) -> None:
    folder = run_path(f"{s3_url}/runs/far")
    for size in (1, 3):
        assert on_ranks(size, lambda comm: written_to(folder, wordy, comm=comm)) == [True] * size
        assert (folder / IDS_FILE).read_bytes() == (run / IDS_FILE).read_bytes()
        assert [each.path for each in Storage(folder.url).entries()] == [IDS_FILE]
    found = IdDictionary.of_run(folder)
    assert found is not None and found.texts(entries(run)) == entries(run)
    number, text = next(iter(entries(run).items()))
    assert invoke(app, "lookup", folder, number).stdout == f"{number}  {text}\n"


@pytest.mark.long
def test_it_has_every_text_and_little_memory_writes_the_same_bytes(
    run: Path, wordy: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert entries(run) == expected(wordy)
    assert not list(run.glob(".ids-*"))
    monkeypatch.setattr(survey, "TEXTS_HELD", 60)
    parts = []
    write_part = survey.write_part
    monkeypatch.setattr(survey, "write_part", lambda path, held: parts.append(len(held)) or write_part(path, held))
    assert written_to(tmp_path, wordy)
    assert (tmp_path / IDS_FILE).read_bytes() == (run / IDS_FILE).read_bytes()
    assert len(parts) > 10


def written_to(folder: RunPath, places: Places, earlier: Path | None = None, **other: Any) -> bool:
    """Write the dictionary of these places' samples, or of `other` ones, by one rank or by another `comm`."""
    schema, comm = load_schema(places.folder / "schema.yaml"), other.get("comm", SoloComm())
    index = open_index(comm, str(other.get("samples", places.folder / "samples")), "train", schema)
    return write_dictionary(comm, folder, index, rules_of(schema), earlier)


@pytest.mark.long
@pytest.mark.parametrize("held", [500_000, 1], ids=["in a rank", "between parts"])
def test_texts_of_one_id_are_refused(held: int, wordy: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "TEXTS_HELD", held)
    colliding = {written("item", 3), written("user", 5)}

    def ids_of(found: Sequence[str]) -> np.ndarray:
        return np.array([5 << 60 if text in colliding else hashed(text) for text in found], np.int64)

    monkeypatch.setattr(columns, "ids_of_texts", ids_of)
    day = min((wordy.folder / "samples" / "train").iterdir(), key=lambda path: path.stat().st_size)
    (tmp_path / "samples" / "train").mkdir(parents=True)
    shutil.copy(day, tmp_path / "samples" / "train")
    with raises(DataError, Problem.TWO_TEXTS, where=5764607523034234880) as caught:
        written_to(tmp_path, wordy, samples=tmp_path / "samples")
    assert {caught.value.values["value"], caught.value.values["other"]} == colliding
    assert not (tmp_path / IDS_FILE).exists()


@pytest.mark.long
def test_a_run_that_goes_on_keeps_it_and_one_that_starts_afresh_does_not(run: Path, wordy: Places) -> None:
    before = (run / IDS_FILE).stat().st_mtime_ns
    disk = run.parent.parent / "disk" / "checkpoints"
    disk.parent.mkdir()
    (run / "checkpoints").rename(disk)
    (run / "checkpoints").symlink_to(disk)
    train_on(wordy, run__name="alone", run__resume=find_checkpoint(run), train__max_steps=3)
    assert (run / IDS_FILE).stat().st_mtime_ns == before
    other = run.parent / "other"
    other.mkdir()
    shutil.copy(run / IDS_FILE, other / IDS_FILE)
    numbers = shutil.copytree(wordy.folder / "samples", wordy.folder / "numbers")
    rewrite(numbers, as_numbers)
    run_alone(wordy, run__name="other", train__max_steps=1, data__samples=numbers)
    assert not (other / IDS_FILE).exists()


@pytest.mark.long
def test_a_run_that_takes_id_rows_takes_their_texts(run: Path, wordy: Places, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    held = {hashed("gone"): "gone", hashed(written("item", 3)): written("item", 3)}
    survey.write_part(earlier / IDS_FILE, held)
    assert written_to(tmp_path, wordy, earlier / IDS_FILE)
    assert entries(tmp_path) == {**expected(wordy), hashed("gone"): "gone"}
    shutil.copytree(run, wordy.folder / "runs" / "first")
    survey.write_part(wordy.folder / "runs" / "first" / IDS_FILE, held)
    for parts, has in (("all", True), ("partial", False)):
        warm = train_on(wordy, run__name=parts, run__warm_start=wordy.folder / "runs" / "first", run__warm_parts=parts)
        assert (hashed("gone") in entries(warm)) == has


@pytest.mark.long
def test_a_run_takes_the_texts_next_to_its_samples(wordy: Places, tmp_path: Path) -> None:
    """Those of samples that were made of logs, whose files have the hashes alone."""
    samples = shutil.copytree(wordy.folder / "samples", tmp_path / "samples")
    rewrite(samples, as_numbers)
    beside = {hashed("of the logs"): "of the logs", hashed(written("item", 3)): written("item", 3)}
    survey.write_part(samples / IDS_FILE, beside)
    assert written_to(tmp_path, wordy, samples=samples)
    assert entries(tmp_path).items() >= beside.items()
    of_run, of_samples = IdDictionary.of_run(tmp_path), IdDictionary.of_samples(Storage(samples))
    survey.write_part(samples / IDS_FILE, {hashed("newer"): "newer"})
    wanted = {hashed("newer"): "newer", hashed("of the logs"): "of the logs"}
    assert survey.texts_of_ids([*wanted, 17, 2**70], (of_run, of_samples, None)) == wanted
    pq.write_table(pa.table({"id": [1], "text": ["one"]}), samples / IDS_FILE)
    with raises(DataError, Problem.NOT_A_DICTIONARY, where=samples / IDS_FILE):
        written_to(tmp_path, wordy, samples=samples)


@pytest.mark.long
def test_a_run_that_goes_on_from_another_folder_takes_its_texts(run: Path, wordy: Places) -> None:
    """Also where a third run has left its own dictionary in the new folder; a warm start's texts stay through both."""
    first, second = (shutil.copytree(run, run.parent / name) for name in ("with-rows-of-before", "second"))
    gone = {hashed("gone"): "gone"}
    survey.write_part(first / IDS_FILE, gone | expected(wordy))
    survey.write_part(second / IDS_FILE, {hashed("of a third run"): "of a third run"})
    train_on(wordy, run__name="second", run__resume=finished(first)[0], run__overwrite=True, train__max_steps=4)
    assert entries(second) == gone | expected(wordy)


@pytest.mark.long
def test_lookup_goes_both_ways_and_names_a_wrong_dictionary(run: Path, wordy: Places, tmp_path: Path) -> None:
    def said(*arguments: object, code: int = 0) -> str:
        return invoke(app, "lookup", *arguments, code=code).output

    text = written("item", 3)
    pair = f'["{text}",3]'
    assert said(run, hashed(text), text, hashed(pair), pair, "nothing", 17).splitlines() == [
        *[f"{hashed(text)}  {text}"] * 2,
        *[f"{hashed(pair)}  {pair}"] * 2,
        f"{hashed('nothing')}  not in it as a text",
        "17  not in it as a text",
    ]
    first = sorted(expected(wordy).items())[:10]
    assert said(run).splitlines()[1:] == [f"{number}  {text}" for number, text in first]
    assert re.search(told(Problem.NO_TEXTS, where=tmp_path), said(tmp_path, 3, code=2))
    (tmp_path / IDS_FILE).write_bytes((run / IDS_FILE).read_bytes()[:500])
    assert re.search(f"error: {told(Problem.NOT_PARQUET, where=tmp_path / IDS_FILE)}", said(tmp_path, 3, code=1))
