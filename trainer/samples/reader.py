"""Samples read into batches, ahead of the step that takes them.

Letters of shapes, here and in the whole package: P ranks, G groups and B samples on this rank, M rows of a side
(G on the user side, B on the ad side), N values of a field, U unique keys asked, R keys received, Q unique among R,
D feature width, V vector width.

The order of an epoch depends on the seed alone: the row groups of all files are shuffled and dealt out to streams (see
trainer.samples.order), and inside each window of a stream the sample groups are shuffled. A global batch has its part
of each stream, one after the other; nothing is dropped, and the last batch is smaller. A group that is cut, between two
batches or two ranks, appears on both sides, with its user fields repeated.

Cost: a rank decodes the streams that it has a share of, and holds one or two windows of each. So with as many streams
as ranks, or more, it decodes little else than its own samples; with one stream, all of them. Evaluation needs no order:
there each rank has one contiguous part of the files and decodes that alone.

numpy, Arrow and Horovod let go of the interpreter for most of it. Where the threads of the step leave no core free, the
work ahead runs while the step waits for other ranks.
"""

import contextlib
import itertools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from featurestore.published.versions import open_published
from featurestore.storage.storage import Storage
from trainer.comm import Comm
from trainer.errors import DataError, DataNotFoundError
from trainer.samples.columns import (
    DecodedGroups,
    Index,
    Rule,
    check_types,
    decode,
    files_of,
    in_either_split,
    name_of,
    ranges,
    rules_of,
    sample_files,
    sizes_of,
    source_columns,
    text_columns,
    values_of,
)
from trainer.samples.order import Piece, Stream, batch_parts, deal, decode_shares, shares_by_rank, windows_of
from trainer.samples.values import bucket_ids, dense_values
from trainer.schema import Field, Schema


@dataclass(frozen=True)
class Jagged:
    """Rows of uneven length: row m holds the next `lengths_M[m]` of `values_N`."""

    values_N: NDArray[np.int64]
    lengths_M: NDArray[np.int32]


@dataclass(frozen=True)
class BatchPosition:
    """Where in the run a global batch is; both count from zero."""

    epoch: int
    step: int


@dataclass(frozen=True)
class Batch:
    """The samples of one global batch that this rank has; G = B = 0 is a valid batch on any rank."""

    fields: Mapping[str, Jagged]
    """Every id, multi_id and content field; M = G on the user side, M = B on the ad side."""
    dense: Mapping[str, NDArray[np.float32]]
    """Every dense field, (M, width)."""
    group_of_sample_B: NDArray[np.int64]
    """Row of the user side that each sample belongs to, in [0, G)."""
    label_B: NDArray[np.float32]
    group_id_B: NDArray[np.int64]
    """The user of each sample, for GAUC."""
    global_samples: int
    """Samples of the global batch, over all ranks: the loss is the sum over local samples divided by it."""
    weights: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Of the fields whose ids have weights, one for each value (N,)."""
    galleries: Mapping[str, Jagged] = field(default_factory=dict)
    """Of content fields with galleries: `values_N` are the numbers of images of each ad or behaviour (in `fields` their
    keys stand one after the other), `lengths_M` the ads (1) or behaviours of a row."""
    position: BatchPosition = field(default=BatchPosition(0, 0))
    place_B: NDArray[np.int64] | None = None
    """Place of each sample in the global batch; None: in this order, from 0 on."""

    @property
    def num_samples(self) -> int:
        """The number B of samples."""
        return len(self.label_B)

    @property
    def places(self) -> NDArray[np.int64]:
        """Place of each sample in the global batch."""
        return np.arange(self.num_samples) if self.place_B is None else self.place_B


@dataclass(frozen=True)
class RowGroup:
    """One Parquet row group: `first_row` is its first sample group's number in the file."""

    file: str
    number: int
    first_row: int
    num_groups: int
    num_samples: int


@dataclass(frozen=True)
class SampleIndex:
    """The row groups of one split, or of some days, in the order of file names."""

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
    def layout_digest(self) -> str:
        """xxh3-128 of names and counts, not of what the rows hold: see trainer.samples.digest."""
        row_groups = self.row_groups
        if self.by_day:
            row_groups = tuple(replace(each, file=name_of(each.file)) for each in row_groups)
        return xxhash.xxh3_128_hexdigest(repr(row_groups).encode())


def open_index(
    comm: Comm, samples: str | Storage, split: str, schema: Schema, days: Sequence[str] | None = None
) -> SampleIndex:
    """Read the footers of `samples`/`split`/*.parquet, each rank those of its share of the files.

    With `days`, those of the files of these days instead, whichever split they are in; no days, no samples. At an
    address with published versions, all ranks read the newest one; who opens several indexes opens it once, and gives
    the storage. Raises, on all ranks together, DataError where there is no sample, or none of a day, or a file is
    damaged, SchemaError where a column is missing or of another type.
    """
    rules = rules_of(schema)
    storage = samples if isinstance(samples, Storage) else comm.on_rank_0(lambda: open_published(samples))
    with comm.agreed():
        files = sample_files(storage, split) if days is None else files_of(storage, days)
        own = [(file, _read_footer(storage, file, rules, schema.label)) for file in files[comm.rank :: comm.size]]
    parts = dict(part for share in comm.allgather_object(own) for part in share)
    row_groups = tuple(group for file in sorted(parts, key=name_of) for group in parts[file][0])
    texts = frozenset(column for _, columns in parts.values() for column in columns)
    index = SampleIndex(storage, row_groups, by_day=days is not None, text_columns=texts)
    if index.num_samples == 0 and days != []:
        what = f"has no *.parquet file with samples ({len(parts)} files)"
        where = storage.full(split) if days is None else f"{storage.url}, days {', '.join(days)}"
        raise DataNotFoundError(f"{where} {what}; write them with: python jobs/build_samples.py")
    return index


class Span(NamedTuple):
    """Samples of a stream, by their positions in it, and the place in the global batch of the first of them."""

    stream: int
    positions: range
    place: int


class SampleReader:
    """Batches of one split for one rank.

    `seed` None: in the files' order, for which `streams` has to be 1. `by_part`: each rank has one contiguous part of
    the split, cut into equally many batches; else a part of each global batch.
    """

    def __init__(
        self,
        index: SampleIndex,
        schema: Schema,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        batch_size: int,
        seed: int | None = None,
        window_groups: int = 1,
        streams: int = 1,
        by_part: bool = False,
    ) -> None:
        self._index, self._schema, self._rules = index, schema, rules_of(schema)
        self._rank, self._num_ranks, self._batch_size = rank, num_ranks, batch_size
        self._seed, self._window_groups, self._by_part = seed, window_groups, by_part
        self.num_streams = max(1, min(streams, len(index.row_groups)))
        self.num_samples = index.num_samples
        self.num_decoded = 0
        """Samples decoded so far."""

    @property
    def index(self) -> SampleIndex:
        """The index of the samples that it reads."""
        return self._index

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, the same on every rank."""
        if not self._by_part:
            return -(-self.num_samples // self._batch_size)
        return -(-max(len(self._part(rank)) for rank in range(self._num_ranks)) // self._part_size)

    def decode_shares(self, num_ranks: int) -> list[float]:
        """Compute for each of `num_ranks` ranks the samples of an epoch that it decodes over those that it has."""
        return decode_shares([stream.num_samples for stream in self._streams(epoch=0)], num_ranks)

    def batches(self, epoch: int = 0, first_step: int = 0) -> Iterator[Batch]:
        """Read this rank's batches from `first_step` of the epoch on; a batch may be without samples.

        Raises DataError.
        """
        streams = self._streams(epoch)
        steps = self._own_parts() if self._by_part else self._slices([stream.num_samples for stream in streams])
        for step, (spans, global_samples) in enumerate(itertools.islice(steps, first_step, None), first_step):
            pieces = [piece for span in spans for piece in streams[span.stream].cut(span.positions)]
            batch = assemble(self._schema, pieces or [self._nothing()], global_samples, BatchPosition(epoch, step))
            # Parts of an evaluation are no parts of one global batch, and need no places in it.
            yield batch if self._by_part else replace(batch, place_B=_places(spans))

    def _streams(self, epoch: int) -> list[Stream]:
        """Deal out the row groups of an epoch."""
        sizes_R = [each.num_samples for each in self._index.row_groups]
        order_R = np.arange(len(sizes_R))
        if self._seed is not None:
            order_R = np.random.default_rng([self._seed, epoch]).permutation(order_R)
        streams, first = [], 1
        for number, members in enumerate(deal(sizes_R, order_R.tolist(), self.num_streams)):
            windows = windows_of(members, number, self.num_streams, self._window_groups)
            counts_W = [sum(sizes_R[each] for each in window) for window in windows]
            seed = None if self._seed is None else (self._seed, epoch, first)
            streams.append(Stream(windows, counts_W, seed, self._decode))
            first += len(windows)
        return streams

    def _slices(self, lengths_S: Sequence[int]) -> Iterator[tuple[list[Span], int]]:
        """Yield this rank's part of each batch, and the batch's samples."""
        own = shares_by_rank(lengths_S, self._num_ranks)[self._rank]
        for begin_S, count_S in batch_parts(lengths_S, self._batch_size):
            place_S = np.cumsum(count_S) - count_S
            spans = []
            for share in own:
                begin, part = int(begin_S[share.stream]), share.of(int(count_S[share.stream]))
                positions = range(begin + part.start, begin + part.stop)
                spans.append(Span(share.stream, positions, int(place_S[share.stream]) + part.start))
            yield spans, int(count_S.sum())

    def _own_parts(self) -> Iterator[tuple[list[Span], int]]:
        """Yield this rank's part of each step of an evaluation, and the samples of all ranks' parts."""
        for step in range(self.steps_per_epoch):
            here = slice(step * self._part_size, (step + 1) * self._part_size)
            together = sum(len(self._part(rank)[here]) for rank in range(self._num_ranks))
            yield [Span(0, self._part(self._rank)[here], 0)], together

    @property
    def _part_size(self) -> int:
        return -(-self._batch_size // self._num_ranks)

    def _part(self, rank: int) -> range:
        return range(self.num_samples * rank // self._num_ranks, self.num_samples * (rank + 1) // self._num_ranks)

    def _decode(self, number: int) -> DecodedGroups:
        row_group = self._index.row_groups[number]
        table = read_row_group(self._index.storage, row_group, list(source_columns(self._rules)))
        full = self._index.storage.full(row_group.file)
        groups = decode(table, self._rules, self._schema.label, full, row_group.first_row)
        if groups.num_samples != row_group.num_samples:
            raise DataError(f"{full} has changed since the run began; start the run again")
        self.num_decoded += groups.num_samples
        return groups

    def _nothing(self) -> Piece:
        """Make a piece without groups, for a rank without data."""
        columns = source_columns(self._rules)
        nothing = pa.table({column: pa.array([], _arrow_type(rule)) for column, rule in columns.items()})
        none_G = np.empty(0, np.int64)
        return Piece(decode(nothing, self._rules, self._schema.label, "", 0), none_G, none_G, none_G)


def assemble(schema: Schema, pieces: Sequence[Piece], global_samples: int, position: BatchPosition) -> Batch:
    """Make a batch of these pieces, in their order."""
    samples = [ranges(piece.begin_G, piece.end_G - piece.begin_G) for piece in pieces]
    counts_G = np.concatenate([piece.end_G - piece.begin_G for piece in pieces])

    def taken(column: str, side: str) -> Jagged:
        rows = [
            piece.groups.columns[column].take(piece.group_G if side == "user" else sample_B)
            for piece, sample_B in zip(pieces, samples, strict=True)
        ]
        return Jagged(np.concatenate([values for values, _ in rows]), np.concatenate([lengths for _, lengths in rows]))

    group_of_sample_B = np.repeat(np.arange(len(counts_G), dtype=np.int64), counts_G)
    return Batch(
        **inputs_of(schema, lambda field, column: taken(column, field.side)),
        group_of_sample_B=group_of_sample_B,
        label_B=taken(schema.label, "ad").values_N.astype(np.float32),
        group_id_B=taken(schema.group, "user").values_N[group_of_sample_B],
        global_samples=global_samples,
        position=position,
    )


def inputs_of(schema: Schema, taken: Callable[[Field, str], Jagged]) -> dict[str, Any]:
    """Take what a batch has of the schema's fields, by the names of `Batch`; `taken` gives rows of a column."""

    def keys(field: Field) -> Jagged:
        rows = taken(field, field.column_name)
        return replace(rows, values_N=bucket_ids(field, rows.values_N)) if field.is_bucketed else rows

    return {
        "fields": {f.name: keys(f) for f in schema.of_kind("id", "multi_id", "content")},
        "dense": {f.name: dense_values(f, taken(f, f.column_name).values_N) for f in schema.of_kind("dense")},
        "galleries": {f.name: taken(f, sizes_of(f.column_name)) for f in schema.fields if f.gallery is not None},
        "weights": {f.name: taken(f, f.weights).values_N for f in schema.fields if f.weights is not None},
    }


def read_row_group(storage: Storage, row_group: RowGroup, columns: list[str]) -> pa.Table:
    """Read those of the columns that the file has. Raises DataError for a file that is gone or damaged."""
    with _opened(storage, row_group.file) as parquet:
        return _read(parquet, storage, row_group, columns)


def read_row_groups(
    storage: Storage, row_groups: Iterable[RowGroup], columns: list[str]
) -> Iterator[tuple[RowGroup, pa.Table]]:
    """Read row groups one by one, as `read_row_group` does; a file that has several in succession is opened once."""
    for file, of_file in itertools.groupby(row_groups, lambda each: each.file):
        with _opened(storage, file) as parquet:
            for row_group in of_file:
                yield row_group, _read(parquet, storage, row_group, columns)


def row_groups_of_table(storage: Storage, file: str, rules: Mapping[str, Rule]) -> list[RowGroup]:
    """List the row groups of a table with one sample a row, and check its columns. Raises DataError, SchemaError."""
    with _opened(storage, file) as parquet:
        check_types(parquet.schema_arrow, rules, storage.full(file))
        counts = [parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups)]
    starts = np.cumsum([0, *counts]).tolist()
    return [RowGroup(file, n, starts[n], count, count) for n, count in enumerate(counts) if count]


def known_ads(comm: Comm, index: SampleIndex, schema: Schema) -> Index:
    """List the distinct values of the schema's `new_ad_field` in a split, ascending; each rank reads a share of it.

    Raises DataError on all ranks together.
    """
    import torch

    column = schema.new_ad_column
    rule = rules_of(schema)[column]
    own = np.empty(0, np.int64)
    row_groups, columns = index.row_groups[comm.rank :: comm.size], list(source_columns({column: rule}))
    with comm.agreed():
        for row_group, table in read_row_groups(index.storage, row_groups, columns):
            file = index.storage.full(row_group.file)
            own = np.union1d(own, values_of(table, column, rule, file, row_group.first_row))
    return np.unique(comm.allgather(torch.from_numpy(own), name="known_ads").numpy())


def _read_footer(storage: Storage, file: str, rules: Mapping[str, Rule], label: str) -> tuple[list[RowGroup], set[str]]:
    """The file's row groups, and its columns of texts.

    The number of samples is that of the label column's values, known without reading them.
    """
    with _opened(storage, file) as parquet:
        check_types(parquet.schema_arrow, rules, storage.full(file))
        metadata, first_row, found = parquet.metadata, 0, []
        leaf = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path.split(".")[0] == label)
        for number in range(metadata.num_row_groups):
            rows = metadata.row_group(number)
            if rows.num_rows:
                found.append(RowGroup(file, number, first_row, rows.num_rows, rows.column(leaf).num_values))
            first_row += rows.num_rows
        return found, text_columns(parquet.schema_arrow, rules)


def _places(spans: Sequence[Span]) -> Index:
    """Return the place of each sample in the global batch."""
    places = [np.arange(span.place, span.place + len(span.positions)) for span in spans]
    return np.concatenate([np.empty(0, np.int64), *places])


def _read(parquet: pq.ParquetFile, storage: Storage, row_group: RowGroup, columns: list[str]) -> pa.Table:
    try:
        return parquet.read_row_group(row_group.number, columns=columns)
    except (pa.ArrowException, OSError) as failure:
        where = f"{storage.full(row_group.file)}, row group {row_group.number}"
        raise DataError(f"{where} is damaged: {str(failure).strip()}; write the file again") from failure


def _opened(storage: Storage, file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(in_either_split(storage.open_input, file), page_checksum_verification=True)
    except FileNotFoundError as failure:
        raise DataError(f"{storage.full(file)} is gone; it was there when the run began") from failure
    except (pa.ArrowException, OSError) as failure:
        raise DataError(
            f"{storage.full(file)} is not a readable Parquet file: {str(failure).strip()}; write it again"
        ) from failure


def _arrow_type(rule: Rule) -> pa.DataType:
    kind: pa.DataType = pa.int64() if rule.number == "integer" else pa.float32()
    for _ in range(rule.depth):
        kind = pa.list_(kind)
    return kind


Result = TypeVar("Result")

_LOWEST_PRIORITY = 19
_LATE, _TIMES = 0.2, 3  # of the time of a step; one after the other


BATCHES_AHEAD = 2


class ReadAhead(Iterator[Batch]):
    """The same batches, read by a thread up to `depth` ahead; an error is raised where its batch would come.

    The thread begins at once, with the priority of who made it, not of who first asks for a batch; `close` ends it.
    """

    def __init__(self, batches: Iterator[Batch], depth: int = BATCHES_AHEAD) -> None:
        self._batches = batches
        self._pool = ThreadPoolExecutor(1, "read-samples")
        self._coming = deque(self._pool.submit(next, batches) for _ in range(depth))

    def __next__(self) -> Batch:
        if not self._coming:
            raise StopIteration
        try:
            batch = self._coming.popleft().result()
        except BaseException:  # StopIteration among them
            self.close()
            raise
        self._coming.append(self._pool.submit(next, self._batches))
        return batch

    def close(self) -> None:
        """End the thread; no more batches come. Safe to call twice."""
        self._coming.clear()
        self._pool.shutdown(cancel_futures=True)


def prepare_ahead(
    count: int, prepare: Callable[[], Result], *, in_background: bool = True
) -> Generator[Callable[[], Result], None, None]:
    """Call `prepare` `count` times in a thread, a call ahead; gives functions that wait for each result, or raise.

    Call n + 1 begins when result n is asked for. So ranks that ask equally often prepare equally often, and collectives
    in `prepare` meet: who has one result has begun the next one, and closing the iterator waits for that.

    `in_background`: at the lowest priority, for work that takes less time than the step beside it. Where results are
    late again and again, because other processes keep the cores busy, a thread of normal priority takes over.
    """
    pool = ThreadPoolExecutor(1, "prepare", initializer=_step_back if in_background else None)
    lateness = _Lateness()
    try:
        coming = pool.submit(prepare) if count else None
        for left in range(count - 1, -1, -1):
            assert coming is not None
            current = coming
            if in_background and lateness.is_habit():
                pool.shutdown()  # ends with the call that it has begun: one after the other
                pool, in_background = ThreadPoolExecutor(1, "prepare"), False
            coming = pool.submit(prepare) if left else None
            yield partial(lateness.timed, current.result)
    finally:
        pool.shutdown()


class _Lateness:
    """Whether those who ask for results have to wait long, compared with the time from one question to the next."""

    def __init__(self) -> None:
        self._asked_s: float | None = None
        self._times_late = 0

    def timed(self, result: Callable[[], Result]) -> Result:
        """Wait for the result and return it."""
        start_s = time.perf_counter()
        value = result()
        if self._asked_s is not None:
            late = time.perf_counter() - start_s > _LATE * (start_s - self._asked_s)
            self._times_late = self._times_late + 1 if late else 0
        self._asked_s = start_s
        return value

    def is_habit(self) -> bool:
        """Tell whether the last results were all late."""
        return self._times_late >= _TIMES


def _step_back() -> None:
    """Gives this thread the lowest priority: whatever the step does goes first. Where that is refused, so be it."""
    if sys.platform == "linux":  # elsewhere priorities are those of processes
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
