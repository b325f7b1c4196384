"""Streams of row groups and what ranks read of them: the batches of one rank, even parts, little decoded twice."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.trainer.conftest import write_samples
from tests.trainer.samples.reading import reader_of, rows_of, serials_of
from trainer.config import DataConfig
from trainer.samples.index import batch_parts, deal, shares_by_rank, streams_of, windows_of
from trainer.samples.reader import Batch


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


FILES = [20, 1, 15]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[pa.Table]]:
    """Few of them: they are read at many sizes by many ranks."""
    folder = tmp_path_factory.mktemp("samples")
    return folder, write_samples(folder / "train", FILES)


@pytest.mark.long
@pytest.mark.parametrize("batch_size", [1, 7, 16, 64, 1_000])
@pytest.mark.parametrize(("num_ranks", "seed", "streams"), [(2, 3, 1), (3, None, 1), (8, 3, 1), (2, 3, 4), (8, 3, 3)])
def test_ranks_together_have_the_batches_of_one_rank(
    samples: tuple[Path, list[pa.Table]], batch_size: int, num_ranks: int, seed: int | None, streams: int
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
def test_every_stream_is_mixed_in_windows_of_its_own(
    samples: tuple[Path, list[pa.Table]], streams: int, window: int
) -> None:
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
def test_an_epoch_in_pieces_that_other_numbers_of_ranks_read(
    samples: tuple[Path, list[pa.Table]], streams: int
) -> None:
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
