"""The row groups of samples: found in the files of a split or of some days, read, and put in an order.

An epoch is several streams. Each is a sequence of row groups, mixed within windows of some of them, and every batch
takes from each stream in proportion to its length, so all streams end together. Batches depend on the seed, the epoch
and the number of streams, not on the number of ranks. What depends on that is who reads: a rank has some of the
streams to itself, so it decodes these alone. Where whole streams do not come out evenly, two ranks share one. With one
stream that all ranks share, each of them decodes everything.

Letters of shapes: R row groups, S streams, W windows, G groups.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from featurestore.format.datafile import check_names
from featurestore.keys import Int64Array
from featurestore.published.versions import open_published
from featurestore.storage.storage import Storage
from trainer.config import DataConfig
from trainer.errors import DataError, DataNotFoundError
from trainer.problems import Problem
from trainer.samples import columns
from trainer.schema.fields import Schema, days_of_file

if TYPE_CHECKING:
    from trainer.comm import Comm


@dataclass(frozen=True)
class RowGroup:
    """One Parquet row group: `first_row` is its first sample group's number in the file."""

    file: str
    number: int
    first_row: int
    num_groups: int
    num_samples: int

    @property
    def day(self) -> str | None:
        """The day of its samples, by the file's name; None where that names none."""
        days = days_of_file(columns.name_of(self.file))
        return next(iter(days[self.number :] if len(days) > 1 else days), None)


@dataclass(frozen=True)
class SampleIndex:
    """The row groups of one split, or of some days, in the order of the days in files' names, and of the names."""

    storage: Storage
    row_groups: tuple[RowGroup, ...]
    by_day: bool = False
    """Chosen by day: it is the same data in whichever split the files are."""
    text_columns: frozenset[str] = frozenset()
    """Columns, crossed ones too, whose IDs are hashes of what some of the files hold."""

    @property
    def num_samples(self) -> int:
        return sum(each.num_samples for each in self.row_groups)

    @property
    def num_groups(self) -> int:
        return sum(each.num_groups for each in self.row_groups)

    @property
    def newest_day(self) -> date | None:
        """The last day of the samples; None if some are of no day, or there are none."""
        days = {each.day for each in self.row_groups}
        return None if None in days else max((date.fromisoformat(day) for day in days if day), default=None)

    @property
    def layout_digest(self) -> str:
        """xxh3-128 of names and counts, not of the rows' content: see `samples_digest`."""
        row_groups = self.row_groups
        if self.by_day:
            row_groups = tuple(replace(each, file=columns.name_of(each.file)) for each in row_groups)
        return xxhash.xxh3_128_hexdigest(repr(row_groups).encode())


def open_index(
    comm: "Comm", samples: str | Storage, split: str, schema: Schema, days: Sequence[str] | None = None
) -> SampleIndex:
    """Read the footers of `samples`/`split`/*.parquet, each rank those of its share of the files.

    With `days`, those of the files of these days instead, whichever split they are in; no days, no samples. At an
    address with published versions, all ranks read the newest one; who opens several indexes opens it once, and gives
    the storage. Raises, on all ranks together, DataError where there is no sample, or none of a day, or a file is
    damaged, SchemaError where a column is missing or of another type.
    """
    rules = columns.rules_of(schema)
    storage = samples if isinstance(samples, Storage) else comm.on_rank_0(lambda: open_published(samples))
    with comm.agreed():
        files = columns.sample_files(storage, split) if days is None else columns.files_of(storage, days)
        own = [(file, _read_footer(storage, file, rules, schema.label)) for file in files[comm.rank :: comm.size]]
    parts = dict(part for share in comm.allgather_object(own) for part in share)
    in_order = sorted(parts, key=lambda file: (days_of_file(columns.name_of(file))[:1], columns.name_of(file)))
    found = (group for file in in_order for group in parts[file][0])
    wanted = set(days or ())
    row_groups = tuple(group for group in found if days is None or group.day in wanted)
    texts = frozenset(column for _, of_file in parts.values() for column in of_file)
    index = SampleIndex(storage, row_groups, by_day=days is not None, text_columns=texts)
    if index.num_samples == 0 and days != []:
        where = storage.full(split) if days is None else f"{storage.url}, days {', '.join(days)}"
        raise DataNotFoundError(Problem.NO_SAMPLES, where, len(parts))
    return index


def read_row_group(storage: Storage, row_group: RowGroup, names: list[str]) -> pa.Table:
    """Read those of the columns that the file has. Raises DataError for a file that is gone or damaged."""
    _, table = next(read_row_groups(storage, [row_group], names))
    return table


def read_row_groups(
    storage: Storage, row_groups: Iterable[RowGroup], names: list[str]
) -> Iterator[tuple[RowGroup, pa.Table]]:
    """Read row groups one by one, as `read_row_group` does; a file that has several in succession is opened once."""
    for file, of_file in itertools.groupby(row_groups, lambda each: each.file):
        with _opened(storage, file) as parquet:
            for row_group in of_file:
                try:
                    table = parquet.read_row_group(row_group.number, columns=names)
                except (pa.ArrowException, OSError) as failure:
                    where = f"{storage.full(file)}, row group {row_group.number}"
                    raise DataError(Problem.SAMPLES_DAMAGED, where, str(failure).strip()) from failure
                yield row_group, table


def read_values(
    index: SampleIndex, row_groups: Iterable[RowGroup], rules: Mapping[str, columns.Rule]
) -> Iterator[dict[str, columns.Values]]:
    """Read all values of the columns that the rules are for, row group by row group. Raises DataError."""
    for row_group, table in read_row_groups(index.storage, row_groups, list(columns.source_columns(rules))):
        file, first_row = index.storage.full(row_group.file), row_group.first_row
        yield {column: columns.values_of(table, column, rule, file, first_row) for column, rule in rules.items()}


def read_texts(
    index: SampleIndex, row_groups: Iterable[RowGroup], rules: Mapping[str, columns.Rule]
) -> Iterator[columns.Encoded]:
    """Read columns of texts, one after the other of each row group, with their IDs. Raises DataError."""
    for row_group, table in read_row_groups(index.storage, row_groups, list(columns.source_columns(rules))):
        file, first_row = index.storage.full(row_group.file), row_group.first_row
        for column, rule in rules.items():
            yield columns.texts_of(table, column, rule, file, first_row)


def row_groups_of_table(storage: Storage, file: str, rules: Mapping[str, columns.Rule]) -> list[RowGroup]:
    """List the row groups of a table with one sample a row, and check its columns. Raises DataError, SchemaError."""
    with _opened(storage, file) as parquet:
        columns.check_types(parquet.schema_arrow, rules, storage.full(file))
        counts = [parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups)]
    starts = np.cumsum([0, *counts]).tolist()
    return [RowGroup(file, n, starts[n], count, count) for n, count in enumerate(counts) if count]


def known_ads(comm: "Comm", index: SampleIndex, schema: Schema) -> Int64Array:
    """List the distinct values of the schema's `new_ad_field` in a split, ascending; each rank reads a share of it.

    Raises DataError on all ranks together.
    """
    import torch

    column = schema.new_ad_column
    with comm.agreed():
        read = read_values(index, index.row_groups[comm.rank :: comm.size], {column: columns.rules_of(schema)[column]})
        own = _distinct(values[column] for values in read)
    return np.unique(comm.allgather(torch.from_numpy(own), name="known_ads").numpy())


def _distinct(blocks: Iterable[Int64Array]) -> Int64Array:
    """List the distinct values of all blocks, ascending.

    Those of blocks are merged when they are as many as those known: a merge at each block takes the square of the time.
    """
    parts, waiting = [np.empty(0, np.int64)], 0
    for block in blocks:
        parts.append(np.unique(block))
        waiting += len(parts[-1])
        if waiting > len(parts[0]):
            parts, waiting = [np.unique(np.concatenate(parts))], 0
    return np.unique(np.concatenate(parts))


def _read_footer(
    storage: Storage, file: str, rules: Mapping[str, columns.Rule], label: str
) -> tuple[list[RowGroup], set[str]]:
    """The file's row groups, and its columns of texts.

    The number of samples is that of the label column's values, known without reading them.
    """
    with _opened(storage, file) as parquet:
        columns.check_types(parquet.schema_arrow, rules, storage.full(file))
        metadata, first_row, found = parquet.metadata, 0, []
        leaf = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path.split(".")[0] == label)
        for number in range(metadata.num_row_groups):
            rows = metadata.row_group(number)
            if rows.num_rows:
                found.append(RowGroup(file, number, first_row, rows.num_rows, rows.column(leaf).num_values))
            first_row += rows.num_rows
        return found, columns.text_columns(parquet.schema_arrow, rules)


def _opened(storage: Storage, file: str) -> pq.ParquetFile:
    try:
        parquet = pq.ParquetFile(columns.in_either_split(storage.open_input, file), page_checksum_verification=True)
        check_names(parquet)
        return parquet
    except FileNotFoundError as failure:
        raise DataError(Problem.SAMPLES_GONE, storage.full(file)) from failure
    except (pa.ArrowException, OSError, UnicodeDecodeError) as failure:
        raise DataError(Problem.NOT_PARQUET, storage.full(file), str(failure).strip()) from failure


_SAMPLES_PER_STREAM = 64
"""Least samples of a stream in a batch, as each stream splits a sample group between two batches."""
_UNEVEN = 1.03
"""Largest ratio of a rank's samples to the mean for which no stream is shared."""
_HUGE = 2
"""Times the mean size of a row group."""
_LAST = 3
"""Row groups of each stream, about."""


class Share(NamedTuple):
    """The part of each step that a rank has of a stream: of `end - begin` of every `length` samples."""

    stream: int
    begin: int
    end: int
    length: int

    def of(self, count: int) -> range:
        """Return the range of this rank among the stream's `count` samples of a batch."""
        return range(count * self.begin // self.length, count * self.end // self.length)


def streams_of(data: DataConfig, row_groups: int, num_samples: int) -> int:
    """Choose the number of streams for training on `row_groups` row groups with `num_samples` samples.

    It is as set, else the largest power of two that a batch, the row groups and the window have room for.
    """
    if not data.shuffle:
        return 1
    if data.shuffle_streams is not None:
        return max(1, min(data.shuffle_streams, row_groups))
    held = data.shuffle_window * row_groups // max(num_samples, 1)  # row groups of mean size
    most = min(row_groups, held, data.global_batch_size // _SAMPLES_PER_STREAM)
    return 1 << max(0, most.bit_length() - 1)


def deal(sizes_R: Sequence[int], order_R: Sequence[int], streams: int) -> list[list[int]]:
    """Assign row groups in the given order, each to the shortest stream; a stream keeps that order.

    Only huge ones come before their turn, and the last ones by their size, so that the streams end about equally long.
    """
    huge = _HUGE * sum(sizes_R) / max(len(sizes_R), 1)
    last = len(order_R) - _LAST * streams

    def turn(place: int) -> tuple[int, int]:
        size = sizes_R[order_R[place]]
        return (0, place) if size > huge else (1, place) if place < last else (2, -size)

    dealt: list[list[int]] = [[] for _ in range(streams)]
    shortest = [(0, stream) for stream in range(streams)]
    for place in sorted(range(len(order_R)), key=turn):
        length, stream = shortest[0]
        heapq.heapreplace(shortest, (length + sizes_R[order_R[place]], stream))
        dealt[stream].append(place)
    return [[order_R[place] for place in sorted(places)] for places in dealt]


def windows_of(row_groups: Sequence[int], sizes_R: Sequence[int], most: int) -> list[list[int]]:
    """Divide a stream's row groups into windows that are mixed, of at most `most` samples or of one row group."""
    windows: list[list[int]] = []
    samples = most
    for each in row_groups:
        samples += sizes_R[each]
        if samples > most or not windows:
            windows.append([])
            samples = sizes_R[each]
        windows[-1].append(each)
    return windows


def batch_parts(lengths_S: Sequence[int], batch_size: int) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Yield for each batch where it begins in each stream, and its samples of each: (S,) and (S,).

    Every batch has `batch_size` samples, the last one the rest. Each stream gives its share of the remaining samples,
    rounded so that the sum is exact; what rounding takes from a stream, later batches give back.
    """
    begin_S, left_S = np.zeros(len(lengths_S), np.int64), np.array(lengths_S, np.int64)
    while left := int(left_S.sum()):
        edges_S = (np.cumsum(left_S) * min(batch_size, left) + left // 2) // left
        count_S = np.diff(edges_S, prepend=0)
        yield begin_S, count_S
        begin_S, left_S = begin_S + count_S, left_S - count_S


def shares_by_rank(lengths_S: Sequence[int], num_ranks: int) -> list[list[Share]]:
    """Divide the streams among the ranks: whole ones, the longest first, to the rank that has least.

    While a rank has over `_UNEVEN` times the mean then, it gives of its last stream to the rank that has least. A
    stream longer than a rank's part is always shared.
    """
    part = sum(lengths_S)  # of a rank, in parts of a sample: there are `num_ranks` to one
    most = int(_UNEVEN * part)
    shares: list[list[Share]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for stream in sorted(range(len(lengths_S)), key=lambda stream: -lengths_S[stream]):
        length, rank = lengths_S[stream] * num_ranks, loads.index(min(loads))
        shares[rank].append(Share(stream, 0, length, length))
        loads[rank] += length
    while max(loads) > most:
        giver, taker = loads.index(max(loads)), loads.index(min(loads))
        moved = min(loads[giver] - part, (part if len(lengths_S) < num_ranks else most) - loads[taker])
        stream, begin, end, length = shares[giver].pop()
        shares[giver].append(Share(stream, begin, end - moved, length))
        shares[taker].append(Share(stream, end - moved, end, length))
        loads[giver] -= moved
        loads[taker] += moved
    return [sorted(own) for own in shares]


class Piece(NamedTuple):
    """Part of a batch: of the groups in memory the samples `begin` to before `end`."""

    groups: columns.DecodedGroups
    begin: int
    end: int

    @property
    def group_range(self) -> tuple[int, int]:
        """The first group that has one of the samples, and the one after the last."""
        starts = self.groups.sample_offsets
        first = int(np.searchsorted(starts, self.begin, side="right")) - 1
        return first, int(np.searchsorted(starts, self.end))

    def counts(self) -> Int64Array:
        """Count the samples of each of these groups."""
        first, end = self.group_range
        ends_G = np.clip(self.groups.sample_offsets[first : end + 1], self.begin, self.end)
        return ends_G[1:] - ends_G[:-1]


class Stream:
    """The row groups of each window, by number, with its count of samples, and the windows that are in memory.

    `seed`: its last number is that of the first window, and counts on; None leaves the groups in their order.
    """

    def __init__(
        self,
        windows: Sequence[Sequence[int]],
        counts_W: Sequence[int],
        seed: tuple[int, int, int] | None,
        decode: Callable[[int], columns.DecodedGroups],
        rules: Mapping[str, columns.Rule],
    ) -> None:
        self._windows, self._seed, self._decode, self._rules = windows, seed, decode, rules
        self._starts = np.concatenate([[0], np.cumsum(counts_W)]).astype(np.int64)
        self.num_samples = int(self._starts[-1])
        self._held: dict[int, columns.DecodedGroups] = {}

    def cut(self, span: range) -> Iterator[Piece]:
        """Cut out the samples at these positions: one piece for each window that they are in."""
        if not span:
            return
        first = int(np.searchsorted(self._starts, span.start, side="right")) - 1
        last = int(np.searchsorted(self._starts, span.stop, side="left"))
        self._held = {window: held for window, held in self._held.items() if window >= first}
        for window in range(first, last):
            groups, start = self._hold(window), int(self._starts[window])
            yield Piece(groups, max(span.start - start, 0), min(span.stop - start, groups.num_samples))

    def _hold(self, window: int) -> columns.DecodedGroups:
        """Return the window's groups in their order, which a batch then takes one after the other."""
        if window not in self._held:
            groups = columns.concatenate([self._decode(each) for each in self._windows[window]])
            if self._seed is not None:
                *seed, first = self._seed
                order_G = np.random.default_rng([*seed, first + window]).permutation(len(groups.sample_offsets) - 1)
                groups = columns.in_order(groups, self._rules, order_G)
            self._held[window] = groups
        return self._held[window]
