"""Batches: nothing lost or repeated for any number of ranks, the content of every field, and files that are refused."""

import contextlib
import itertools
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.faulty import FaultyStorage
from tests.trainer.conftest import sample_table, write_samples
from tests.trainer.runs.saved import ThreadComm, on_ranks
from tests.trainer.samples.reading import SCHEMA, expected_rows, reader_of, rows_of, serials_of
from trainer.comm import SoloComm
from trainer.errors import DataError, SchemaError
from trainer.runs.open import PartReader
from trainer.samples.columns import rules_of
from trainer.samples.index import SampleIndex, known_ads, open_index
from trainer.samples.reader import SampleReader
from trainer.schema.fields import Field, Schema
from trainer.stages import ReadAhead, prepare_ahead

Samples = tuple[Path, list[pa.Table]]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    folder = tmp_path_factory.mktemp("samples")
    return folder, write_samples(folder / "train", [30, 1, 22])


def test_every_value_of_every_sample(samples: Samples) -> None:
    folder, tables = samples
    expected = expected_rows(tables)
    small = {"window": 1, "batch_size": 5}
    for options in ({}, {"seed": None}, small, {"window": 2_500}, {"streams": 3}, {**small, "streams": 100}):
        rows = [row for batch in reader_of(folder, **options).batches() for row in rows_of(batch)]
        assert {row[0]: row for row in rows} == expected
        assert len(rows) == len(expected)


@pytest.mark.long
@pytest.mark.parametrize("num_ranks", [1, 2, 5, 70])
def test_evaluation_order_has_each_sample_once_and_reads_its_own_part(samples: Samples, num_ranks: int) -> None:
    folder, tables = samples
    readers = [reader_of(folder, rank, num_ranks, PartReader, seed=None, batch_size=32) for rank in range(num_ranks)]
    assert len({reader.steps_per_epoch for reader in readers}) == 1
    batches = [list(reader.batches()) for reader in readers]
    serials = [serial for rank in batches for batch in rank for serial in serials_of(batch)]
    assert sorted(serials) == serials == sorted(expected_rows(tables))
    for step in range(readers[0].steps_per_epoch):
        parts = [rank[step] for rank in batches]
        assert {part.global_samples for part in parts} == {sum(part.num_samples for part in parts)}


def test_order_depends_on_seed_and_epoch_alone(samples: Samples) -> None:
    folder, _ = samples

    def order(seed: int, epoch: int) -> list[int]:
        return [serial for batch in reader_of(folder, seed=seed).batches(epoch) for serial in serials_of(batch)]

    orders = [order(3, 0), order(3, 1), order(4, 0)]
    assert order(3, 0) == orders[0]
    assert len({tuple(each) for each in orders}) == 3
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    sessions = [
        [next(iter(batch.fields["session"].values_N)) // 7 for batch in reader_of(folder, window=1).batches(epoch)]
        for epoch in (0, 1)
    ]
    assert sessions[0] != sessions[1], "row groups are shuffled too, in each epoch otherwise"


def test_ranks_without_samples_have_empty_fields(samples: Samples) -> None:
    batch = next(reader_of(samples[0], rank=0, num_ranks=4, batch_size=2).batches())
    assert (batch.num_samples, batch.global_samples) == (0, 2)
    for field in batch.fields.values():
        assert len(field.values_N) == len(field.lengths_M) == 0
        assert field.values_N.dtype == field.lengths_M.dtype == np.int64


def test_no_samples_names_the_job(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="crossmedia samples"):
        open_index(SoloComm(), str(tmp_path), "train", SCHEMA)
    (tmp_path / "train").mkdir()
    pq.write_table(sample_table(1).slice(0, 0), tmp_path / "train" / "a.parquet")
    with pytest.raises(DataError, match="crossmedia samples"):
        open_index(SoloComm(), str(tmp_path), "train", SCHEMA)


def test_damaged_and_changed_files_are_named(tmp_path: Path) -> None:
    write_samples(tmp_path / "train", [30, 30])
    path = tmp_path / "train" / "day=2026-01-02.parquet"
    content = path.read_bytes()
    reader = reader_of(tmp_path)
    path.write_bytes(content[:20] + bytes(400) + content[420:])
    with pytest.raises(DataError, match=r"day=2026-01-02\.parquet, row group \d+ is damaged"):
        list(reader.batches())
    for unreadable in (content[: len(content) // 2], content.replace(b"session", b"sess\xffon")):
        path.write_bytes(unreadable)
        with pytest.raises(DataError, match=r"day=2026-01-02\.parquet is not a readable Parquet file"):
            reader_of(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"day=2026-01-02\.parquet is gone"):
        list(reader.batches())
    shutil.rmtree(tmp_path / "train")
    write_samples(tmp_path / "train", [30, 30], seed=1)
    with pytest.raises(DataError, match=r"day=2026-01-0\d\.parquet has changed since the run began"):
        list(reader.batches())


def test_days_are_found_in_either_split(tmp_path: Path) -> None:
    tables = write_samples(tmp_path / "train", [10, 12, 14])
    (tmp_path / "test").mkdir()
    third = tmp_path / "train" / "day=2026-01-03.parquet"

    def opened(days: list[str], split: str = "train") -> SampleIndex:
        return open_index(SoloComm(), str(tmp_path), split, SCHEMA, days)

    alone = opened(["2026-01-03"], "test")
    third.rename(tmp_path / "test" / third.name)
    index = opened(["2026-01-03", "2026-01-01"])
    reader = SampleReader(index, SCHEMA, batch_size=1_000)
    found = [serial for batch in reader.batches() for serial in serials_of(batch)]
    assert found == [s for t in (tables[0], tables[2]) for row in t["ad_serial"].to_pylist() for s in row]
    assert opened(["2026-01-03"]).layout_digest == alone.layout_digest != index.layout_digest
    assert opened([]).num_samples == 0
    with pytest.raises(DataError, match=r"no samples of 2026-01-09: its files are from 2026-01-01 to 2026-01-03"):
        opened(["2026-01-09"])
    for number, file in enumerate(sorted(tmp_path.glob("*/*.parquet"))):
        file.rename(file.with_name(f"part-{number}.parquet"))
    with pytest.raises(DataError, match="its files are not named by day"):
        opened(["2026-01-01"])


def test_one_column_is_read_one_way_and_its_fields_have_all_a_fill_or_none() -> None:
    clash = Schema(fields=(*SCHEMA.fields, Field(name="items", side="user", kind="id", column="ad_item")))
    message = r"column ad_item: field items reads it as integer of side user, .*; change one of them in the schema"
    with pytest.raises(SchemaError, match=message):
        rules_of(clash)
    buckets = Field(name="bucket", side="ad", kind="id", column="price", buckets=8)
    scaled = Field(name="price", side="ad", kind="dense", transform="log_standardize")
    filled = (buckets.model_copy(update={"fill": "bucket"}), scaled.model_copy(update={"fill": "mean"}))
    for fields in ((buckets, scaled), filled):
        assert rules_of(Schema(fields=(*SCHEMA.fields, *fields)))["price"].may_miss == (fields is filled)
    for fields in ((buckets, filled[1]), (filled[0], scaled)):
        with pytest.raises(SchemaError, match=r"column price: .*list<real or null> .*; give both fields a fill, or"):
            rules_of(Schema(fields=(*SCHEMA.fields, *fields)))


def test_known_ads(samples: Samples) -> None:
    """Each file is opened once, however many row groups it has: to read its footer takes longer than a column."""
    folder, tables = samples
    index = open_index(SoloComm(), str(folder), "train", SCHEMA)
    expected = sorted({item for row in pa.concat_tables(tables).column("ad_item").to_pylist() for item in row})
    opened: list[str] = []
    noting = FaultyStorage(
        index.storage, {"open_input": lambda open_input, file: opened.append(file) or open_input(file)}
    )
    assert known_ads(SoloComm(), replace(index, storage=noting), SCHEMA).tolist() == expected
    assert len(opened) == len(tables) < len(index.row_groups)


def test_known_ads_of_several_ranks_are_those_of_all(samples: Samples) -> None:
    """No row group is left out: each impression is an ad of its own here."""
    folder, tables = samples
    schema = SCHEMA.model_copy(update={"new_ad_field": "serial"})
    index = open_index(SoloComm(), str(folder), "train", schema)
    with mock.patch.object(ThreadComm, "allgather", autospec=True, side_effect=ThreadComm.allgather) as sends:
        found = on_ranks(3, lambda comm: known_ads(comm, index, schema).tolist())
    assert found == [sorted(expected_rows(tables))] * 3
    assert all(0 < len(call.args[1]) < len(found[0]) for call in sends.mock_calls), "each has read its share"


@pytest.mark.parametrize("depth", [1, 3])
def test_reading_ahead_keeps_order_hands_errors_on_and_ends_its_thread(depth: int) -> None:
    def numbers() -> Iterator[int]:
        yield from range(6)
        raise DataError("broken")

    before = threading.active_count()
    ahead = ReadAhead(numbers(), depth)
    assert [next(ahead) for _ in range(6)] == list(range(6))
    with pytest.raises(DataError, match="broken"):
        next(ahead)
    ahead = ReadAhead(itertools.count(), depth)
    next(ahead)
    assert threading.active_count() == before + 1
    ahead.close()
    assert threading.active_count() == before
    assert list(ahead) == []


def test_calls_are_one_ahead_in_one_thread() -> None:
    begun: list[str] = []
    go_on = threading.Semaphore(0)

    def prepare() -> int:
        begun.append(threading.current_thread().name)
        go_on.acquire()
        return len(begun)

    ahead = prepare_ahead(3, prepare)
    for number in (1, 2, 3):
        go_on.release()
        assert next(ahead)() == number  # the next call has been handed to the thread, and waits there
    assert list(ahead) == []
    assert len(begun) == 3 and len(set(begun)) == 1
    before = threading.active_count()
    assert list(prepare_ahead(0, lambda: 1)) == []
    assert threading.active_count() == before, "nothing to prepare begins nothing"


def test_an_error_comes_where_its_result_would_and_closing_waits_for_the_call_that_was_begun() -> None:
    numbers, done = iter([1, 2]), list[int]()
    with contextlib.closing(prepare_ahead(3, lambda: next(numbers))) as ahead:
        assert [next(ahead)(), next(ahead)()] == [1, 2]
        with pytest.raises(StopIteration):
            next(ahead)()
    with contextlib.closing(prepare_ahead(5, lambda: done.append(1))) as ahead:
        next(ahead)()
    assert len(done) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux alone")
class TestPriority:
    def test_work_ahead_steps_back_for_the_step(self) -> None:
        (ahead,) = prepare_ahead(1, niceness)
        (beside,) = prepare_ahead(1, niceness, in_background=False)
        assert (ahead(), beside()) == (19, niceness())

    def test_work_that_is_always_late_comes_forward(self) -> None:
        in_call = threading.Event()

        def slow() -> int:
            assert not in_call.is_set()  # never two calls at once
            in_call.set()
            time.sleep(0.02)
            in_call.clear()
            return niceness()

        found = [result() for result in prepare_ahead(30, slow)]
        assert found[0] == 19 and found[-1] == niceness()
        assert sorted(found, reverse=True) == found and found.count(19) >= 4

    def test_reading_keeps_the_priority_of_the_step_whoever_asks_first(self) -> None:
        found = []

        def batches() -> Iterator[Any]:
            while True:
                found.append(niceness())
                yield object()

        with contextlib.closing(ReadAhead(batches(), 1)) as ahead:
            for result in prepare_ahead(3, lambda: next(ahead)):
                result()
        assert set(found) == {niceness()}


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
