"""The samples' files: the row groups of a split, or of some days, and their reading."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from featurestore.published.versions import open_published
from featurestore.storage.storage import Storage
from trainer.comm import Comm
from trainer.errors import DataError, DataNotFoundError
from trainer.samples.columns import (
    Encoded,
    Index,
    Rule,
    Values,
    check_types,
    files_of,
    in_either_split,
    name_of,
    rules_of,
    sample_files,
    source_columns,
    text_columns,
    texts_of,
    values_of,
)
from trainer.schema import Schema


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
        """xxh3-128 of names and counts, not of what the rows hold: see `samples_digest`."""
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
        raise DataNotFoundError(f"{where} {what}; write them with: crossmedia samples")
    return index


def read_row_group(storage: Storage, row_group: RowGroup, columns: list[str]) -> pa.Table:
    """Read those of the columns that the file has. Raises DataError for a file that is gone or damaged."""
    _, table = next(read_row_groups(storage, [row_group], columns))
    return table


def read_row_groups(
    storage: Storage, row_groups: Iterable[RowGroup], columns: list[str]
) -> Iterator[tuple[RowGroup, pa.Table]]:
    """Read row groups one by one, as `read_row_group` does; a file that has several in succession is opened once."""
    for file, of_file in itertools.groupby(row_groups, lambda each: each.file):
        with _opened(storage, file) as parquet:
            for row_group in of_file:
                try:
                    table = parquet.read_row_group(row_group.number, columns=columns)
                except (pa.ArrowException, OSError) as failure:
                    where = f"{storage.full(file)}, row group {row_group.number}"
                    raise DataError(f"{where} is damaged: {str(failure).strip()}; write the file again") from failure
                yield row_group, table


def read_values(
    index: SampleIndex, row_groups: Iterable[RowGroup], rules: Mapping[str, Rule]
) -> Iterator[dict[str, Values]]:
    """Read all values of the columns that the rules are for, row group by row group. Raises DataError."""
    for row_group, table in read_row_groups(index.storage, row_groups, list(source_columns(rules))):
        file, first_row = index.storage.full(row_group.file), row_group.first_row
        yield {column: values_of(table, column, rule, file, first_row) for column, rule in rules.items()}


def read_texts(index: SampleIndex, row_groups: Iterable[RowGroup], rules: Mapping[str, Rule]) -> Iterator[Encoded]:
    """Read columns of texts, one after the other of each row group, with their IDs. Raises DataError."""
    for row_group, table in read_row_groups(index.storage, row_groups, list(source_columns(rules))):
        file, first_row = index.storage.full(row_group.file), row_group.first_row
        for column, rule in rules.items():
            yield texts_of(table, column, rule, file, first_row)


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
    wanted, own = {column: rules_of(schema)[column]}, np.empty(0, np.int64)
    with comm.agreed():
        for values in read_values(index, index.row_groups[comm.rank :: comm.size], wanted):
            own = np.union1d(own, values[column])
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


def _opened(storage: Storage, file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(in_either_split(storage.open_input, file), page_checksum_verification=True)
    except FileNotFoundError as failure:
        raise DataError(f"{storage.full(file)} is gone; it was there when the run began") from failure
    except (pa.ArrowException, OSError) as failure:
        raise DataError(
            f"{storage.full(file)} is not a readable Parquet file: {str(failure).strip()}; write it again"
        ) from failure
