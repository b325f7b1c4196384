"""Sample groups from Parquet as global batches, the same for any number of ranks.

The order of an epoch depends on the seed alone: the row groups of all files are shuffled, windows of `window_groups`
of them are formed, and inside each window the sample groups are shuffled. Global batch t is samples [t N, (t + 1) N)
of that order (the last one is smaller; nothing is dropped), and a rank takes an even, contiguous slice of it. A group
that is cut appears on both sides, with its user fields repeated.

Cost: a rank holds the one or two windows that its slice is in, so memory is bounded by the window; and it decodes every
window that one of its slices meets, so for batches smaller than a window, each rank decodes all of them. Evaluation
needs no order: there each rank has one contiguous part of the files and decodes that alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from featurestore.storage.storage import Storage
from trainer.comm import Comm
from trainer.errors import DataError, DataNotFoundError
from trainer.samples.batch import Batch, BatchPosition, Jagged
from trainer.samples.columns import (
    DecodedGroups,
    Index,
    Rule,
    check_types,
    concatenate,
    decode,
    ranges,
    rules_of,
    sizes_of,
    source_columns,
    text_columns,
    values_of,
)
from trainer.samples.days import files_of, name_of, sample_files
from trainer.samples.transform import bucket_ids, dense_values
from trainer.schema import Field, Schema


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
        """xxh3-128 of names and counts, not of what the rows hold: see trainer.runs.samples_digest."""
        row_groups = self.row_groups
        if self.by_day:
            row_groups = tuple(replace(each, file=name_of(each.file)) for each in row_groups)
        return xxhash.xxh3_128_hexdigest(repr(row_groups).encode())


def open_index(comm: Comm, samples: str, split: str, schema: Schema, days: Sequence[str] | None = None) -> SampleIndex:
    """Read the footers of `samples`/`split`/*.parquet, each rank those of its share of the files.

    With `days`, those of the files of these days instead, whichever split they are in; no days, no samples. Raises, on
    all ranks together, DataError where there is no sample, or none of a day, or a file is damaged, SchemaError where a
    column is missing or of another type.
    """
    storage, rules = Storage(samples), rules_of(schema)
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


class SampleReader:
    """Batches of one split for one rank. `seed` None: in the files' order. `by_part`: each rank has one contiguous part
    of the split, cut into equally many batches; else a slice of each global batch."""

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
        by_part: bool = False,
    ) -> None:
        self._index, self._schema, self._rules = index, schema, rules_of(schema)
        self._rank, self._num_ranks, self._batch_size = rank, num_ranks, batch_size
        self._seed, self._window_groups, self._by_part = seed, window_groups, by_part
        self.num_samples = index.num_samples

    @property
    def index(self) -> SampleIndex:
        """What it reads."""
        return self._index

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, the same on every rank."""
        if not self._by_part:
            return -(-self.num_samples // self._batch_size)
        return -(-max(len(self._part(rank)) for rank in range(self._num_ranks)) // self._part_size)

    def batches(self, epoch: int = 0, first_step: int = 0) -> Iterator[Batch]:
        """Read this rank's batches from `first_step` of the epoch on; a batch may be without samples.

        Raises DataError.
        """
        windows = _Windows(self._index, self._rules, self._schema.label, self._seed, epoch, self._window_groups)
        for step in range(first_step, self.steps_per_epoch):
            span, global_samples = self._span(step)
            pieces = list(windows.cut(span)) or [windows.nothing()]
            batch = assemble(self._schema, pieces, global_samples, BatchPosition(epoch, step))
            # Parts of an evaluation are no slices of one global batch, and need no places in it.
            yield batch if self._by_part else replace(batch, first_sample=span.start - step * self._batch_size)

    @property
    def _part_size(self) -> int:
        return -(-self._batch_size // self._num_ranks)

    def _part(self, rank: int) -> range:
        return range(self.num_samples * rank // self._num_ranks, self.num_samples * (rank + 1) // self._num_ranks)

    def _span(self, step: int) -> tuple[range, int]:
        """Positions of this rank's samples of a step in the epoch's order, and the samples of all ranks."""
        if self._by_part:
            here = slice(step * self._part_size, (step + 1) * self._part_size)
            return self._part(self._rank)[here], sum(len(self._part(rank)[here]) for rank in range(self._num_ranks))
        start = step * self._batch_size
        count = min(self._batch_size, self.num_samples - start)
        first, last = count * self._rank // self._num_ranks, count * (self._rank + 1) // self._num_ranks
        return range(start + first, start + last), count


class Piece(NamedTuple):
    """Part of a batch: of the groups in memory the rows `group_G`, of each its samples `begin_G` to before `end_G`."""

    groups: DecodedGroups
    group_G: Index
    begin_G: Index
    end_G: Index


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
        try:
            return parquet.read_row_group(row_group.number, columns=columns)
        except (pa.ArrowException, OSError) as failure:
            where = f"{storage.full(row_group.file)}, row group {row_group.number}"
            raise DataError(f"{where} is damaged: {str(failure).strip()}; write the file again") from failure


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
    with comm.agreed():
        for row_group in index.row_groups[comm.rank :: comm.size]:
            table = read_row_group(index.storage, row_group, list(source_columns({column: rule})))
            file = index.storage.full(row_group.file)
            own = np.union1d(own, values_of(table, column, rule, file, row_group.first_row))
    return np.unique(comm.allgather(torch.from_numpy(own), name="known_ads").numpy())


class _Windows:
    """The epoch's order, and the windows of it that are in memory."""

    def __init__(
        self,
        index: SampleIndex,
        rules: Mapping[str, Rule],
        label: str,
        seed: int | None,
        epoch: int,
        window_groups: int,
    ) -> None:
        self._index, self._rules, self._label, self._seed, self._epoch = index, rules, label, seed, epoch
        row_groups = np.arange(len(index.row_groups))
        if seed is not None:
            row_groups = np.random.default_rng([seed, epoch]).permutation(row_groups)
        self._members = [row_groups[at : at + window_groups] for at in range(0, len(row_groups), window_groups)]
        counts_W = [sum(index.row_groups[each].num_samples for each in window) for window in self._members]
        self._starts = np.concatenate([[0], np.cumsum(counts_W)]).astype(np.int64)
        self._held: dict[int, tuple[DecodedGroups, Index, Index]] = {}

    def cut(self, span: range) -> Iterator[Piece]:
        """The samples at these positions of the epoch's order: one piece for each window that they are in."""
        if not span:
            return
        first = int(np.searchsorted(self._starts, span.start, side="right")) - 1
        last = int(np.searchsorted(self._starts, span.stop, side="left"))
        self._held = {window: held for window, held in self._held.items() if window >= first}
        for window in range(first, last):
            groups, order_G, ends_G = self._hold(window)
            low = max(span.start - int(self._starts[window]), 0)
            high = min(span.stop - int(self._starts[window]), groups.num_samples)
            chosen = slice(int(np.searchsorted(ends_G, low, side="right")), int(np.searchsorted(ends_G, high)) + 1)
            group_G = order_G[chosen]
            begin_G, end_G = groups.sample_offsets[group_G], groups.sample_offsets[group_G + 1]
            cut_before_G = np.maximum(low - (ends_G[chosen] - (end_G - begin_G)), 0)
            cut_after_G = np.maximum(ends_G[chosen] - high, 0)
            yield Piece(groups, group_G, begin_G + cut_before_G, end_G - cut_after_G)

    def nothing(self) -> Piece:
        """A piece without groups, for a rank without data."""
        columns = source_columns(self._rules)
        nothing = pa.table({column: pa.array([], _arrow_type(rule)) for column, rule in columns.items()})
        groups = decode(nothing, self._rules, self._label, "", 0)
        none_G = np.empty(0, np.int64)
        return Piece(groups, none_G, none_G, none_G)

    def _hold(self, window: int) -> tuple[DecodedGroups, Index, Index]:
        """The window's groups, its order, and where each group of that order ends in the window's samples."""
        if window not in self._held:
            parts = [self._decode(self._index.row_groups[each]) for each in self._members[window]]
            groups = concatenate(parts)
            order_G = np.arange(len(groups.sample_offsets) - 1)
            if self._seed is not None:
                order_G = np.random.default_rng([self._seed, self._epoch, 1 + window]).permutation(order_G)
            self._held[window] = groups, order_G, np.cumsum(np.diff(groups.sample_offsets)[order_G])
        return self._held[window]

    def _decode(self, row_group: RowGroup) -> DecodedGroups:
        table = read_row_group(self._index.storage, row_group, list(source_columns(self._rules)))
        full = self._index.storage.full(row_group.file)
        groups = decode(table, self._rules, self._label, full, row_group.first_row)
        if groups.num_samples != row_group.num_samples:
            raise DataError(f"{full} has changed since the run began; start the run again")
        return groups


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


def _opened(storage: Storage, file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(storage.open_input(file), page_checksum_verification=True)
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
