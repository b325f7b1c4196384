"""Ranks that read together: the batches of one rank, any number of ranks at any step, and little that two decode."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.trainer.samples.reading import reader_of, rows_of, serials_of
from trainer.samples.order import batch_parts, deal, windows_of
from trainer.samples.reader import Batch

pytestmark = pytest.mark.long

Write = Callable[..., list[pa.Table]]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, write_samples: Write) -> tuple[Path, list[pa.Table]]:
    folder = tmp_path_factory.mktemp("samples")
    return folder, write_samples(folder / "train", [30, 1, 22])


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, write_samples: Write) -> Path:
    """Fewer samples, for what is read at many sizes by many ranks."""
    folder = tmp_path_factory.mktemp("few")
    write_samples(folder / "train", [20, 1, 15])
    return folder


@pytest.mark.long
@pytest.mark.parametrize("batch_size", [1, 7, 16, 64, 1_000])
@pytest.mark.parametrize(("num_ranks", "seed", "streams"), [(2, 3, 1), (3, None, 1), (8, 3, 1), (2, 3, 4), (8, 3, 3)])
def test_ranks_together_have_the_batches_of_one_rank(
    few: Path, batch_size: int, num_ranks: int, seed: int | None, streams: int
) -> None:
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "streams": streams}
    alone = list(reader_of(few, **options).batches(epoch=1))
    total = sum(batch.num_samples for batch in alone)
    assert [batch.num_samples for batch in alone[:-1]] == [min(batch_size, total)] * (len(alone) - 1)
    assert all(batch.places.tolist() == list(range(batch.num_samples)) for batch in alone)
    ranks = [list(reader_of(few, rank, num_ranks, **options).batches(epoch=1)) for rank in range(num_ranks)]
    for step, batch in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        assert _rows_by_place(parts) == rows_of(batch)
        sizes = [part.num_samples for part in parts]
        assert max(sizes) - min(sizes) <= (1 if streams == 1 else max(4, batch_size // 4))
        assert {part.global_samples for part in parts} == {batch.num_samples} == {batch.global_samples}
        assert {(part.position.epoch, part.position.step) for part in parts} == {(1, step)}


def _rows_by_place(parts: Iterable[Batch]) -> list[tuple[Any, ...]]:
    """The rows of a global batch, of which each rank has a part."""
    placed = [each for part in parts for each in zip(part.places.tolist(), rows_of(part), strict=True)]
    assert sorted(place for place, _ in placed) == list(range(len(placed)))
    return [row for _, row in sorted(placed)]


@pytest.mark.parametrize(("row_group", "groups"), [(1, 60), (10, 300), (1_000, 300)])
def test_ranks_decode_their_own_streams_alone(
    tmp_path: Path, write_samples: Write, row_group: int, groups: int
) -> None:
    """But for a stream that two of them share, or a single row group."""
    write_samples(tmp_path / "train", [groups, 1, groups // 2], row_group=row_group)
    (_, *readers) = [
        reader_of(tmp_path, rank, ranks, streams=8, batch_size=128, window=32 * row_group)
        for ranks in (1, 4)
        for rank in range(ranks)
    ]
    own = [sum(batch.num_samples for batch in reader.batches()) for reader in readers]
    assert sum(own) == readers[0].num_samples
    shares = [reader.num_decoded / samples for reader, samples in zip(readers, own, strict=True)]
    assert shares == pytest.approx(readers[0].decode_shares(4), rel=0.05)
    assert max(shares) < 1.3 if row_group < 1_000 else max(shares) > 2
    alone = reader_of(tmp_path, streams=8, batch_size=128, window=32 * row_group)
    assert len(list(alone.batches())) == alone.steps_per_epoch
    assert alone.num_decoded == alone.num_samples


@pytest.mark.parametrize(("streams", "window"), [(1, 60), (3, 180)])
def test_every_stream_is_mixed_in_windows_of_its_own(
    samples: tuple[Path, list[pa.Table]], streams: int, window: int
) -> None:
    """The order of an epoch, written out: no window is mixed as another one, and none as in another epoch."""
    folder, tables = samples
    groups = [row["ad_serial"] for table in tables for row in table.to_pylist()]
    starts = [start + at for start, table in ((0, 30), (30, 1), (31, 22)) for at in range(0, table, 7)]
    row_groups = [groups[low:high] for low, high in itertools.pairwise([*starts, 53])]
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
        parts = batch_parts([len(each) for each in serials], 16)
        expected = [
            [
                serial
                for each, at, count in zip(serials, begin_S, count_S, strict=True)
                for serial in each[at : at + count]
            ]
            for begin_S, count_S in parts
        ]
        reader = reader_of(folder, streams=streams, window=window, batch_size=16)
        assert [serials_of(batch) for batch in reader.batches(epoch)] == expected


@pytest.mark.parametrize("streams", [1, 5])
def test_an_epoch_in_pieces_that_other_numbers_of_ranks_read(
    samples: tuple[Path, list[pa.Table]], streams: int
) -> None:
    folder, _ = samples
    expected = [rows_of(batch) for batch in reader_of(folder, streams=streams).batches(epoch=1)]
    found = []
    for num_ranks, first, last in ((4, 0, 3), (1, 3, 4), (3, 4, 7), (2, 7, len(expected))):
        ranks = [
            reader_of(folder, rank, num_ranks, streams=streams).batches(epoch=1, first_step=first)
            for rank in range(num_ranks)
        ]
        found += [_rows_by_place(parts) for parts in itertools.islice(zip(*ranks, strict=True), last - first)]
    assert found == expected
