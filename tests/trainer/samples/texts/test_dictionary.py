"""ids.parquet of a run: every text of the training samples, the same at any number of ranks, and the way back."""

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from featurestore.published.paths import FarPath, run_path
from featurestore.storage.storage import Storage
from tests.ranks import StandingRanks
from tests.trainer.runs.saved import on_ranks
from tests.trainer.samples.texts.wordy import hashed, replaced, rewrite, written
from trainer.comm import Comm, SoloComm
from trainer.config.config import load_config
from trainer.errors import DataError
from trainer.main import train
from trainer.runs.folder import find_checkpoint, finished
from trainer.samples import columns, dictionary
from trainer.samples.columns import rules_of
from trainer.samples.dictionary import FILE, IdDictionary, write_dictionary
from trainer.samples.index import open_index
from trainer.schema import load_schema
from trainer.schema.__main__ import app

pytestmark = pytest.mark.long

COLUMNS = ("user", "ad_item", "behavior_item", "ad_scene")
CROSSED = "  - {name: pair, side: ad, kind: id, table: item, columns: [ad_item, ad_category]}\n"
Places = Any


@pytest.fixture(scope="module")
def wordy(make_places: Callable[[Path], Places], tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Places whose samples have texts, and a schema that crosses two columns."""
    places = make_places(tmp_path_factory.mktemp("wordy"))
    rewrite(places.folder / "samples", partial(replaced, columns=COLUMNS, kind=pa.string(), value=written))
    from trainer.schema import DEFAULT_SCHEMA

    (places.folder / "schema.yaml").write_text(DEFAULT_SCHEMA.read_text() + CROSSED)
    return places


def settings(places: Places, **changes: Any) -> list[str]:
    schema = places.folder / "schema.yaml"
    return list(places.settings(data__schema_file=schema, train__max_steps=2, **changes))


@pytest.fixture(scope="module")
def run(wordy: Places) -> Path:
    """A run of one rank on them."""
    train(load_config(settings=settings(wordy, run__name="alone")), SoloComm())
    return Path(wordy.folder) / "runs" / "alone"


def expected(places: Places) -> dict[int, str]:
    found = set()
    for path in places.folder.glob("samples/train/*.parquet"):
        for row in pq.read_table(path, partitioning=None).to_pylist():
            found |= {row["user"], *row["ad_item"], *row["behavior_item"], *row["ad_scene"]}
            found |= {f'["{item}",{n}]' for item, n in zip(row["ad_item"], row["ad_category"], strict=True)}
    return {hashed(text): text for text in found}


def entries(folder: Path) -> dict[int, str]:
    table = pq.read_table(folder / FILE)
    ids = table["id"].to_pylist()
    assert ids == sorted(set(ids))
    return dict(zip(ids, table["text"].to_pylist(), strict=True))


def test_it_has_every_text_of_the_training_samples(run: Path, wordy: Places) -> None:
    assert entries(run) == expected(wordy)
    assert not list(run.glob(".ids-*"))


def test_ranks_without_a_shared_disk_write_the_same_bytes_to_s3(run: Path, wordy: Places, s3_url: str) -> None:
    folder, schema = run_path(f"{s3_url}/runs/far"), load_schema(str(wordy.folder / "schema.yaml"))
    assert isinstance(folder, FarPath)
    for size in (1, 3):

        def write(comm: Comm) -> bool:
            index = open_index(comm, str(wordy.folder / "samples"), "train", schema)
            return write_dictionary(comm, folder, index, rules_of(schema))

        assert on_ranks(size, write) == [True] * size
        assert (folder / FILE).read_bytes() == (run / FILE).read_bytes()
        assert [each.path for each in Storage(folder.url).entries()] == [FILE]
    found = IdDictionary.of_run(folder)
    assert found is not None and found.texts(entries(run)) == entries(run)
    number, text = next(iter(entries(run).items()))
    done = CliRunner().invoke(app, ["lookup", str(folder), str(number)])
    assert done.stdout == f"{number}  {text}\n"


def test_two_ranks_write_the_same_bytes(run: Path, wordy: Places, two_ranks: StandingRanks) -> None:
    two_ranks.run("-m", "trainer.main", "--set", *settings(wordy, run__name="two"))
    assert (run.parent / "two" / FILE).read_bytes() == (run / FILE).read_bytes()


@pytest.mark.long
def test_little_memory_writes_the_same_bytes(
    run: Path, wordy: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dictionary, "HELD", 60)
    parts = []
    write_part = dictionary.write_part
    monkeypatch.setattr(dictionary, "write_part", lambda path, held: parts.append(len(held)) or write_part(path, held))
    assert written_to(tmp_path, wordy)
    assert (tmp_path / FILE).read_bytes() == (run / FILE).read_bytes()
    assert len(parts) > 10


def written_to(folder: Path, places: Places, earlier: Path | None = None, samples: Path | None = None) -> bool:
    schema = load_schema(places.folder / "schema.yaml")
    index = open_index(SoloComm(), str(samples or places.folder / "samples"), "train", schema)
    return write_dictionary(SoloComm(), folder, index, rules_of(schema), earlier)


@pytest.mark.parametrize("held", [500_000, 1], ids=["in a rank", "between parts"])
def test_two_texts_of_one_id_are_refused(
    held: int, wordy: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dictionary, "HELD", held)
    colliding = {written("item", 3), written("user", 5)}

    def ids_of(found: Sequence[str]) -> np.ndarray:
        return np.array([5 << 60 if text in colliding else hashed(text) for text in found], np.int64)

    monkeypatch.setattr(columns, "ids_of_texts", ids_of)
    day = min((wordy.folder / "samples" / "train").iterdir(), key=lambda path: path.stat().st_size)
    (tmp_path / "samples" / "train").mkdir(parents=True)
    shutil.copy(day, tmp_path / "samples" / "train")
    with pytest.raises(DataError, match="id 5764607523034234880 is that of two texts of the samples, ") as caught:
        written_to(tmp_path, wordy, samples=tmp_path / "samples")
    assert all(repr(text) in str(caught.value) for text in colliding)
    assert not (tmp_path / FILE).exists()


def test_a_run_that_goes_on_keeps_it_and_one_that_starts_afresh_does_not(run: Path, wordy: Places) -> None:
    before = (run / FILE).stat().st_mtime_ns
    disk = run.parent.parent / "disk" / "checkpoints"
    disk.parent.mkdir()
    (run / "checkpoints").rename(disk)
    (run / "checkpoints").symlink_to(disk)
    more = [*settings(wordy, run__name="alone", run__resume=find_checkpoint(run)), "train.max_steps=3"]
    train(load_config(settings=more), SoloComm())
    assert (run / FILE).stat().st_mtime_ns == before
    other = run.parent / "other"
    other.mkdir()
    shutil.copy(run / FILE, other / FILE)
    plain = [*wordy.settings(run__name="other", train__max_steps=1, data__samples=wordy.folder / "numbers")]
    shutil.copytree(wordy.folder / "samples", wordy.folder / "numbers")
    rewrite(wordy.folder / "numbers", partial(as_numbers))
    train(load_config(settings=plain), SoloComm())
    assert not (other / FILE).exists()


def as_numbers(table: pa.Table) -> pa.Table:
    for column in COLUMNS:
        rows = table[column].to_pylist()
        made = [[hashed(text) for text in row] if isinstance(row, list) else hashed(row) for row in rows]
        table = table.set_column(table.schema.get_field_index(column), column, pa.array(made))
    return table


@pytest.mark.long
def test_a_run_that_takes_id_rows_takes_their_texts(run: Path, wordy: Places, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    held = {hashed("gone"): "gone", hashed(written("item", 3)): written("item", 3)}
    dictionary.write_part(earlier / FILE, held)
    assert written_to(tmp_path, wordy, earlier / FILE)
    assert entries(tmp_path) == {**expected(wordy), hashed("gone"): "gone"}
    shutil.copytree(run, wordy.folder / "runs" / "first")
    dictionary.write_part(wordy.folder / "runs" / "first" / FILE, held)
    for parts, has in (("full", True), ("partial", False)):
        warm = settings(wordy, run__name=parts, run__warm_start=wordy.folder / "runs" / "first", run__warm_parts=parts)
        train(load_config(settings=warm), SoloComm())
        assert (hashed("gone") in entries(wordy.folder / "runs" / parts)) == has


def test_a_run_that_goes_on_from_another_folder_takes_its_texts(run: Path, wordy: Places) -> None:
    """Also where a third run has left its own dictionary in the new folder; a warm start's texts stay through both."""
    first = run.parent / "with-rows-of-before"
    shutil.copytree(run, first)
    gone = {hashed("gone"): "gone"}
    dictionary.write_part(first / FILE, gone | expected(wordy))
    second = run.parent / "second"
    shutil.copytree(run, second)
    dictionary.write_part(second / FILE, {hashed("of a third run"): "of a third run"})
    checkpoint = finished(first)[0]
    resumed = settings(wordy, run__name="second", run__resume=checkpoint, run__overwrite=True)
    train(load_config(settings=[*resumed, "train.max_steps=4"]), SoloComm())
    assert entries(second) == gone | expected(wordy)


def said(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_lookup_goes_both_ways(run: Path) -> None:
    text = written("item", 3)
    pair = f'["{text}",3]'
    output = said("lookup", run, hashed(text), text, hashed(pair), pair, "nothing", 17)
    assert output.splitlines() == [
        f"{hashed(text)}  {text}",
        f"{hashed(text)}  {text}",
        f"{hashed(pair)}  {pair}",
        f"{hashed(pair)}  {pair}",
        f"{hashed('nothing')}  not in the training samples as a text",
        "17  not in the training samples as a text",
    ]


def test_lookup_needs_a_dictionary(tmp_path: Path) -> None:
    assert f"{tmp_path} has no ids.parquet" in said("lookup", tmp_path, 3, code=2)


def test_a_damaged_dictionary_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes((run / FILE).read_bytes()[:500])
    assert f"error: {tmp_path / FILE} is not a readable Parquet file" in said("lookup", tmp_path, 3, code=1)


def test_lookup_shows_the_first(run: Path, wordy: Places) -> None:
    output = said("lookup", run)
    ids = sorted(expected(wordy))
    assert f"{run / FILE}: {len(ids):,} texts of the training samples and their ids; the first of them:" in output
    assert output.splitlines()[1:] == [f"{number}  {expected(wordy)[number]}" for number in ids[:10]]


def test_inspect_and_check_of_samples_with_texts(wordy: Places, tmp_path: Path) -> None:
    said("inspect", wordy.folder / "samples", "--out", tmp_path / "schema.yaml")
    found = {field.name: field for field in load_schema(tmp_path / "schema.yaml").fields}
    assert (found["ad_item"].kind, found["behavior_item"].kind, found["user"].kind) == ("id", "multi_id", "id")
    assert "different, lists of 1 to 6, as 'item ü" in (tmp_path / "schema.yaml").read_text()
    assert "fit the schema" in said("check", tmp_path / "schema.yaml", wordy.folder / "samples")
