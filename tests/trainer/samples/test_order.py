"""Streams of row groups: batches that no number of ranks changes, parts that are even, and little decoded twice."""

import itertools
from typing import Any

import numpy as np
import pytest

from trainer.config.config import DataConfig
from trainer.samples.order import batch_parts, deal, decode_shares, shares_by_rank, streams_of, windows_of


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
        sizes_R = np.random.default_rng(0).integers(1, 50, 300).tolist()
        for most in (49, 100, 1_000, 100_000):
            windows = windows_of(range(300), sizes_R, most)
            assert list(itertools.chain(*windows)) == list(range(300))
            held = [sum(sizes_R[each] for each in window) for window in windows]
            assert max(held) <= most
            assert all(size + sizes_R[after[0]] > most for size, after in zip(held, windows[1:], strict=False))

    def test_a_row_group_of_more_samples_is_a_window_of_its_own(self) -> None:
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


class TestBatches:
    @pytest.mark.parametrize(("kind", "size"), [*((kind, 60_000) for kind in KINDS), ("full", 997), ("one huge", 130)])
    def test_have_their_part_of_every_stream_to_the_end(self, kind: str, size: int) -> None:
        lengths_S = np.array(streams(kind, groups=150))
        at_S, counts = np.zeros(len(lengths_S), int), []
        for begin_S, count_S in batch_parts(lengths_S.tolist(), size):
            assert (begin_S == at_S).all() and (count_S >= 0).all()
            assert np.abs(count_S - lengths_S * count_S.sum() / lengths_S.sum()).max() < 2
            at_S = at_S + count_S
            counts.append(int(count_S.sum()))
        assert (at_S == lengths_S).all()
        assert set(counts[:-1]) == {size} and 0 < counts[-1] <= size

    def test_without_samples_there_are_none(self) -> None:
        assert list(batch_parts([0], 10)) == []


def _is_each_once(parts: list[range], count: int) -> bool:
    """Whether the parts have each number below `count` once."""
    is_taken = np.zeros(count, bool)
    for each in parts:
        is_taken[each.start : each.stop : each.step] = True
    return bool(is_taken.all()) and sum(map(len, parts)) == count


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
            assert all(_is_each_once(taken[stream], count) for stream, count in enumerate(count_S))
            assert max(parts) <= 1.04 * sum(parts) / ranks + 2
        assert max(decode_shares(lengths_S, ranks)) <= 1.3

    @pytest.mark.parametrize("ranks", [1, 3, 40])
    def test_of_one_stream_are_its_slices(self, ranks: int) -> None:
        slices = [share.of(97) for own in shares_by_rank([1_000], ranks) for share in own]
        assert sorted(slices, key=lambda each: each.start) == [
            range(97 * rank // ranks, 97 * (rank + 1) // ranks) for rank in range(ranks)
        ]
        assert decode_shares([1_000], ranks) == pytest.approx([ranks] * ranks)

    def test_more_ranks_than_streams_share_them_evenly(self) -> None:
        lengths_S = [500, 300, 200]
        for own in shares_by_rank(lengths_S, 10):
            assert sum(len(share.of(lengths_S[share.stream])) for share in own) == pytest.approx(100, abs=2)
        assert decode_shares([0], 2) == [1.0, 1.0]


def test_the_parts_of_batches_are_those_that_saved_positions_count_on() -> None:
    parts = [count_S.tolist() for _, count_S in batch_parts([7, 5, 11], 4)]
    assert parts == [[1, 1, 2], [1, 1, 2], [1, 1, 2], [1, 1, 2], [2, 0, 2], [1, 1, 1]]
