"""Batches: streams of row groups and each rank's part of them, the content of every field, files that are refused."""

import contextlib
import itertools
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.faulty import FaultyStorage
from tests.raised import raises
from tests.trainer.conftest import sample_table, write_samples
from tests.trainer.runs.saved import ThreadComm, on_ranks
from tests.trainer.samples.reading import SCHEMA, expected_rows, reader_of, rows_of, serials_of
from trainer.comm import SoloComm
from trainer.config import DataConfig
from trainer.errors import DataError, SchemaError
from trainer.problems import Problem
from trainer.runs.open import PartReader
from trainer.samples.columns import rules_of
from trainer.samples.index import (
    SampleIndex,
    _distinct,
    batch_parts,
    deal,
    known_ads,
    open_index,
    shares_by_rank,
    streams_of,
    windows_of,
)
from trainer.samples.reader import Batch, SampleReader
from trainer.schema.fields import Field, Schema
from trainer.stages import ReadAhead, prepare_ahead

Samples = tuple[Path, list[pa.Table]]
FILES = [20, 1, 15]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """Few of them: they are read at many sizes by many ranks."""
    folder = tmp_path_factory.mktemp("samples")
    return folder, write_samples(folder / "train", FILES)


def sizes(kind: str, count: int = 1_000) -> list[int]:
    """Samples of row groups: of full ones, of files that end in a smaller one, with a huge one, and of tiny files."""
    draw = np.random.default_rng(4)
    full = draw.normal(6_000, 80, count).astype(int)
    match kind:
        case "uneven files":
            full[:: 1 + count // 60] = draw.integers(1, 6_000, len(full[:: 1 + count // 60]))
        case "one huge":
            full[count // 2] = 20 * 6_000
        case "one row group a file":
            full = draw.integers(2, 6_000, count)
    return full.tolist()


KINDS = ("full", "uneven files", "one huge", "one row group a file")


def streams(kind: str, count: int = 128, groups: int = 1_000) -> list[int]:
    """The lengths of the streams of an epoch."""
    sizes_R = sizes(kind, groups)
    order_R = np.random.default_rng(0).permutation(len(sizes_R)).tolist()
    return [sum(sizes_R[each] for each in stream) for stream in deal(sizes_R, order_R, count)]


class TestStreams:
    @pytest.mark.parametrize("kind", KINDS)
    def test_are_about_equally_long_and_keep_the_order(self, kind: str) -> None:
        sizes_R = sizes(kind)
        order_R = np.random.default_rng(1).permutation(len(sizes_R)).tolist()
        dealt = deal(sizes_R, order_R, 40)
        assert sorted(itertools.chain(*dealt)) == list(range(len(sizes_R)))
        place = {row_group: place for place, row_group in enumerate(order_R)}
        assert all(sorted(stream, key=place.__getitem__) == stream for stream in dealt)
        lengths_S = [sum(sizes_R[each] for each in stream) for stream in dealt]
        assert max(lengths_S) - min(lengths_S) < 6_100  # a full row group
        assert deal(sizes_R, order_R, 1) == [order_R]

    def test_windows_together_hold_what_is_asked_for(self) -> None:
        """A row group of more samples is a window of its own."""
        sizes_R = np.random.default_rng(0).integers(1, 50, 300).tolist()
        for most in (49, 100, 1_000, 100_000):
            windows = windows_of(range(300), sizes_R, most)
            assert list(itertools.chain(*windows)) == list(range(300))
            held = [sum(sizes_R[each] for each in window) for window in windows]
            assert max(held) <= most
            assert all(size + sizes_R[after[0]] > most for size, after in zip(held, windows[1:], strict=False))
        assert windows_of([3, 0, 1, 2], [5, 90, 5, 5], 10) == [[3, 0], [1], [2]]
        assert windows_of([0, 1], [5, 5], 0) == [[0], [1]]
        assert windows_of([], [], 10) == []

    @pytest.mark.parametrize(
        ("changes", "row_groups", "expected"),
        [
            ({}, 1_000, 8),
            ({"global_batch_size": 60_000, "shuffle_window": 128_000}, 1_000, 128),
            ({"global_batch_size": 60_000}, 30, 16),
            ({"global_batch_size": 60_000, "shuffle_window": 500_000}, 1_000, 256),
            ({"global_batch_size": 60_000, "shuffle_window": 1_000}, 1_000, 1),
            ({"global_batch_size": 20}, 1_000, 1),
            ({"shuffle_streams": 100}, 1_000, 100),
            ({"shuffle_streams": 100}, 30, 30),
            ({"shuffle_streams": 100, "shuffle": False}, 1_000, 1),
            ({}, 0, 1),
        ],
    )
    def test_how_many(self, changes: dict[str, Any], row_groups: int, expected: int) -> None:
        assert streams_of(DataConfig(**changes), row_groups, 1_000 * row_groups) == expected


@pytest.mark.parametrize(("kind", "size"), [*((kind, 60_000) for kind in KINDS), ("full", 997), ("one huge", 130)])
def test_batches_have_their_part_of_every_stream_to_the_end(kind: str, size: int) -> None:
    lengths_S = np.array(streams(kind, groups=150))
    at_S, counts = np.zeros(len(lengths_S), int), []
    for begin_S, count_S in batch_parts(lengths_S.tolist(), size):
        assert (begin_S == at_S).all() and (count_S >= 0).all()
        assert np.abs(count_S - lengths_S * count_S.sum() / lengths_S.sum()).max() < 2
        at_S = at_S + count_S
        counts.append(int(count_S.sum()))
    assert (at_S == lengths_S).all()
    assert set(counts[:-1]) == {size} and 0 < counts[-1] <= size


def test_the_parts_of_batches_are_those_that_saved_positions_count_on() -> None:
    parts = [count_S.tolist() for _, count_S in batch_parts([7, 5, 11], 4)]
    assert parts == [[1, 1, 2], [1, 1, 2], [1, 1, 2], [1, 1, 2], [2, 0, 2], [1, 1, 1]]
    assert list(batch_parts([0], 10)) == []


def decode_shares(lengths_S: list[int], num_ranks: int) -> list[float]:
    """Of each rank the samples that it decodes over those that it has; 1 where it has none."""
    found = []
    for own in shares_by_rank(lengths_S, num_ranks):
        has = sum(share.end - share.begin for share in own)
        found.append(sum(share.length for share in own) / has if has else 1.0)
    return found


class TestShares:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("ranks", [1, 2, 3, 7, 8, 16, 32, 40])
    def test_are_even_and_decode_little_more(self, kind: str, ranks: int) -> None:
        lengths_S = streams(kind)
        for count_S in (lengths_S, [length // 100 for length in lengths_S]):  # an epoch, a batch
            taken: dict[int, list[range]] = {stream: [] for stream in range(len(lengths_S))}
            parts = []
            for own in shares_by_rank(lengths_S, ranks):
                for share in own:
                    taken[share.stream].append(share.of(count_S[share.stream]))
                parts.append(sum(len(share.of(count_S[share.stream])) for share in own))
            for stream, count in enumerate(count_S):
                times = np.bincount(np.concatenate([np.arange(e.start, e.stop, e.step) for e in taken[stream]]))
                assert len(times) == count and (times == 1).all()
            assert max(parts) <= 1.04 * sum(parts) / ranks + 2
        assert max(decode_shares(lengths_S, ranks)) <= 1.3

    @pytest.mark.parametrize("ranks", [1, 3, 40])
    def test_of_one_stream_or_few_are_its_slices(self, ranks: int) -> None:
        slices = [share.of(97) for own in shares_by_rank([1_000], ranks) for share in own]
        assert sorted(slices, key=lambda each: each.start) == [
            range(97 * rank // ranks, 97 * (rank + 1) // ranks) for rank in range(ranks)
        ]
        assert decode_shares([1_000], ranks) == pytest.approx([ranks] * ranks)
        for own in shares_by_rank([500, 300, 200], 10):  # more ranks than streams
            assert sum(len(share.of([500, 300, 200][share.stream])) for share in own) == pytest.approx(100, abs=2)
        assert decode_shares([0], 2) == [1.0, 1.0]


@pytest.mark.long
@pytest.mark.parametrize("batch_size", [1, 7, 16, 64, 1_000])
@pytest.mark.parametrize(("num_ranks", "seed", "streams"), [(2, 3, 1), (3, None, 1), (8, 3, 1), (2, 3, 4), (8, 3, 3)])
def test_ranks_together_have_the_batches_of_one_rank(
    samples: Samples, batch_size: int, num_ranks: int, seed: int | None, streams: int
) -> None:
    folder, _ = samples
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "streams": streams}
    alone = list(reader_of(folder, **options).batches(epoch=1))
    total = sum(batch.num_samples for batch in alone)
    assert [batch.num_samples for batch in alone[:-1]] == [min(batch_size, total)] * (len(alone) - 1)
    assert all(batch.places.tolist() == list(range(batch.num_samples)) for batch in alone)
    ranks = [list(reader_of(folder, rank, num_ranks, **options).batches(epoch=1)) for rank in range(num_ranks)]
    for step, batch in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        assert _rows_by_place(parts) == rows_of(batch)
        sizes = [part.num_samples for part in parts]
        assert max(sizes) - min(sizes) <= (1 if streams == 1 else max(4, batch_size // 4))
        assert {part.global_samples for part in parts} == {batch.num_samples} == {batch.global_samples}


def _rows_by_place(parts: Iterable[Batch]) -> list[tuple[Any, ...]]:
    """The rows of a global batch, of which each rank has a part."""
    placed = [each for part in parts for each in zip(part.places.tolist(), rows_of(part), strict=True)]
    assert sorted(place for place, _ in placed) == list(range(len(placed)))
    return [row for _, row in sorted(placed)]


@pytest.mark.long
@pytest.mark.parametrize(("row_group", "groups"), [(1, 60), (10, 300), (1_000, 300)])
def test_ranks_decode_their_own_streams_alone(tmp_path: Path, row_group: int, groups: int) -> None:
    """But for a stream that two of them share, or a single row group."""
    write_samples(tmp_path / "train", [groups, 1, groups // 2], row_group=row_group)
    options = {"streams": 8, "batch_size": 128, "window": 32 * row_group}
    readers = [reader_of(tmp_path, rank, 4, **options) for rank in range(4)]
    own = [sum(batch.num_samples for batch in reader.batches()) for reader in readers]
    assert sum(own) == readers[0].num_samples
    shares = [reader.num_decoded / samples for reader, samples in zip(readers, own, strict=True)]
    lengths_S = [each.num_samples for each in readers[0]._streams(epoch=0)]
    assert shares == pytest.approx(decode_shares(lengths_S, 4), rel=0.05)
    assert max(shares) < 1.3 if row_group < 1_000 else max(shares) > 2
    alone = reader_of(tmp_path, **options)
    assert len(list(alone.batches())) == alone.steps_per_epoch
    assert alone.num_decoded == alone.num_samples


@pytest.mark.long
@pytest.mark.parametrize(("streams", "window"), [(1, 60), (3, 120)])
def test_every_stream_is_mixed_in_windows_of_its_own(samples: Samples, streams: int, window: int) -> None:
    """The order of an epoch, written out: no window is mixed as another one, and none as in another epoch."""
    folder, tables = samples
    groups = [row["ad_serial"] for table in tables for row in table.to_pylist()]
    starts = [sum(FILES[:file]) + at for file, size in enumerate(FILES) for at in range(0, size, 7)]
    row_groups = [groups[low:high] for low, high in itertools.pairwise([*starts, sum(FILES)])]
    sizes = [sum(map(len, each)) for each in row_groups]
    for epoch in (0, 2):
        order = np.random.default_rng([3, epoch]).permutation(len(row_groups)).tolist()
        first, serials = 1, []
        for members in deal(sizes, order, streams):
            mixed: list[int] = []
            for held in windows_of(members, sizes, window // streams):
                own = [group for each in held for group in row_groups[each]]
                shuffled = np.random.default_rng([3, epoch, first]).permutation(len(own))
                mixed += [serial for place in shuffled for serial in own[place]]
                first += 1
            serials.append(mixed)
        expected = []
        for begin_S, count_S in batch_parts([len(each) for each in serials], 16):
            ends_S = begin_S + count_S
            expected.append([s for own, at, end in zip(serials, begin_S, ends_S, strict=True) for s in own[at:end]])
        reader = reader_of(folder, streams=streams, window=window, batch_size=16)
        assert [serials_of(batch) for batch in reader.batches(epoch)] == expected


@pytest.mark.long
@pytest.mark.parametrize("streams", [1, 5])
def test_an_epoch_in_pieces_that_other_numbers_of_ranks_read(samples: Samples, streams: int) -> None:
    folder, _ = samples
    expected = [rows_of(batch) for batch in reader_of(folder, streams=streams).batches(epoch=1)]
    found = []
    for num_ranks, first, last in ((4, 0, 2), (1, 2, 3), (3, 3, 5), (2, 5, len(expected))):
        ranks = [
            reader_of(folder, rank, num_ranks, streams=streams).batches(epoch=1, first_step=first)
            for rank in range(num_ranks)
        ]
        found += [_rows_by_place(parts) for parts in itertools.islice(zip(*ranks, strict=True), last - first)]
    assert found == expected


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
    with raises(DataError, Problem.NO_SAMPLES, where=tmp_path / "train", value=0):
        open_index(SoloComm(), str(tmp_path), "train", SCHEMA)
    (tmp_path / "train").mkdir()
    pq.write_table(sample_table(1).slice(0, 0), tmp_path / "train" / "a.parquet")
    with raises(DataError, Problem.NO_SAMPLES, where=tmp_path / "train", value=1):
        open_index(SoloComm(), str(tmp_path), "train", SCHEMA)


def test_files_that_go_or_change_meanwhile_are_named(tmp_path: Path) -> None:
    write_samples(tmp_path / "train", [30, 30])
    path = tmp_path / "train" / "day=2026-01-02.parquet"
    reader = reader_of(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"session", b"sess\xffon"))
    with raises(DataError, Problem.NOT_PARQUET, where=path):
        reader_of(tmp_path)
    path.unlink()
    with raises(DataError, Problem.SAMPLES_GONE, where=path):
        list(reader.batches())
    shutil.rmtree(tmp_path / "train")
    write_samples(tmp_path / "train", [30, 30], seed=1)
    with raises(DataError, Problem.SAMPLES_CHANGED, where=re.compile(r"/day=2026-01-0\d\.parquet$")):
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
    lacking, known = Problem.NO_SAMPLES_OF_DAYS, "from 2026-01-01 to 2026-01-03"
    with raises(DataError, lacking, where=tmp_path, value="2026-01-09", known=known):
        opened(["2026-01-09"])
    for number, file in enumerate(sorted(tmp_path.glob("*/*.parquet"))):
        file.rename(file.with_name(f"part-{number}.parquet"))
    with raises(DataError, lacking, where=tmp_path, value="2026-01-01", known=re.compile("^not named by day")):
        opened(["2026-01-01"])


def test_one_column_is_read_one_way_and_its_fields_have_all_a_fill_or_none() -> None:
    clash = Schema(fields=(*SCHEMA.fields, Field(name="items", side="user", kind="id", column="ad_item")))
    rules = {"owner": "field items", "value": "integer", "side": "user", "hint": "change one of them"}
    with raises(SchemaError, Problem.COLUMN_OF_TWO_RULES, where="ad_item", **rules):
        rules_of(clash)
    buckets = Field(name="bucket", side="ad", kind="id", column="price", buckets=8)
    scaled = Field(name="price", side="ad", kind="dense", transform="log_standardize")
    filled = (buckets.model_copy(update={"fill": "bucket"}), scaled.model_copy(update={"fill": "mean"}))
    for fields in ((buckets, scaled), filled):
        assert rules_of(Schema(fields=(*SCHEMA.fields, *fields)))["price"].may_miss == (fields is filled)
    for fields, types in (
        ((buckets, filled[1]), {"value": "list<real or null>", "other_rule": "list<real>"}),
        ((filled[0], scaled), {"value": "list<real>", "other_rule": "list<real or null>"}),
    ):
        types |= {"hint": "give both fields a fill, or neither (weights have none)"}
        with raises(SchemaError, Problem.COLUMN_OF_TWO_RULES, where="price", **types):
            rules_of(Schema(fields=(*SCHEMA.fields, *fields)))


def test_known_ads(samples: Samples) -> None:
    """Each file is opened once, however many row groups it has: to read its footer takes longer than a column."""
    folder, tables = samples
    index = open_index(SoloComm(), str(folder), "train", SCHEMA)
    expected = sorted({item for row in pa.concat_tables(tables).column("ad_item").to_pylist() for item in row})
    opened: list[str] = []
    noting = FaultyStorage(index.storage, {"open_input": lambda call, file: opened.append(file) or call(file)})
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


def test_ads_of_many_row_groups_are_merged_in_few_rounds() -> None:
    """With a merge for each, a log of 10 million impressions was merged for five minutes."""
    blocks = [np.arange(first, first + 10)[::-1] for first in range(0, 10_000, 5)]
    with mock.patch.object(np, "unique", side_effect=np.unique) as sorts:
        assert _distinct(blocks).tolist() == list(range(10_005))
    assert sum(len(call.args[0]) for call in sorts.mock_calls) < 20 * 10_005
    assert _distinct([]).tolist() == []


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
