"""Sample files with the codes of their images as further columns, row group by row group.

Letters of shapes: G groups, N values of a column.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.errors import StorageError
from featurestore.storage.storage import Storage
from pipeline.errors import SampleError, SampleOptionError
from pipeline.semantic.codes import NO_CODE, CodeIndex

SPLITS = ("train", "test")


@dataclass
class RewrittenSamples:
    """The counts of rewritten samples."""

    files: int = 0
    groups: int = 0
    references: int = 0
    references_without_code: int = 0
    keys_without_code: set[int] = field(default_factory=set)


def code_columns(column: str, num_levels: int) -> dict[str, tuple[str, int]]:
    """Name the columns that an image column gets: the code of each level, and prefixes of two codes and more.

    Each with what it is: ("level", 0) … or ("prefix", 2) …
    """
    names = {f"{column}_sid{level}": ("level", level) for level in range(num_levels)}
    return names | {f"{column}_sid_prefix{length}": ("prefix", length) for length in range(2, num_levels + 1)}


def rewrite(samples: str, folder: Path, columns: Iterable[str], index: CodeIndex) -> RewrittenSamples:
    """Write every file of `samples`/SPLIT below `folder`, with `code_columns` of the image `columns` added.

    Images without a code get NO_CODE, and are counted. Raises SampleError for a column that is missing or no list of
    whole numbers, and where there is no file.
    """
    storage, done, names = Storage(samples), RewrittenSamples(), list(columns)
    for split in SPLITS:
        (folder / split).mkdir()
    for path in sample_files(samples):
        _rewrite_file(storage, path, folder / path, names, index, done)
    return done


def sample_files(samples: str) -> list[str]:
    """List the files of samples. Raises SampleOptionError where there is none."""
    storage = Storage(samples)
    found = [f"{split}/{name}" for split in SPLITS for name in storage.list(split) if name.endswith(".parquet")]
    if not found:
        raise SampleOptionError(
            f"{storage.full('')}: no train/*.parquet or test/*.parquet; --samples is a folder of samples"
        )
    return found


def _rewrite_file(
    storage: Storage, path: str, target: Path, columns: list[str], index: CodeIndex, done: RewrittenSamples
) -> None:
    writer: pq.ParquetWriter | None = None
    for read in _row_groups(storage, path):
        table = reduce(lambda made, column: _with_codes(made, column, index, storage.full(path), done), columns, read)
        writer = writer or pq.ParquetWriter(target, table.schema, compression="zstd", write_page_checksum=True)
        writer.write_table(table, row_group_size=max(1, len(table)))
        done.groups += len(table)
    if writer is not None:
        writer.close()
    done.files += 1


def _row_groups(storage: Storage, path: str) -> Iterator[pa.Table]:
    try:
        with pq.ParquetFile(storage.open_input(path), page_checksum_verification=True) as file:
            for number in range(file.num_row_groups):
                yield file.read_row_group(number)
    except (pa.ArrowException, OSError, StorageError) as error:
        raise SampleError(f"{storage.full(path)}: cannot be read: {error}") from error


def _with_codes(table: pa.Table, column: str, index: CodeIndex, where: str, done: RewrittenSamples) -> pa.Table:
    if column not in table.column_names:
        raise SampleError(f"{where}: column {column!r} is missing; is it the schema of these samples?")
    array: Any = table.column(column).combine_chunks()
    if not pa.types.is_list(array.type) or not pa.types.is_integer(array.type.value_type):
        raise SampleError(f"{where}: column {column!r} is {array.type}, not a list of image keys")
    values: Any = array.flatten()
    if array.null_count or values.null_count:
        raise SampleError(f"{where}: column {column!r} has nulls")
    keys_N = values.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
    full_N = index.lookup(keys_N)
    without_N = full_N == NO_CODE
    done.references += len(keys_N)
    done.references_without_code += int(without_N.sum())
    done.keys_without_code.update(np.unique(keys_N[without_N]).tolist())
    lengths_G = np.diff(array.offsets.to_numpy())
    offsets: Any = pa.array(np.concatenate([[0], np.cumsum(lengths_G)]), pa.int32())
    for name, (what, number) in code_columns(column, index.num_levels).items():
        if name in table.column_names:
            raise SampleError(f"{where}: column {name!r} is there already; name samples without semantic IDs")
        ids_N = index.code(full_N, number) if what == "level" else index.prefix(full_N, number)
        table = table.append_column(name, pa.ListArray.from_arrays(offsets, pa.array(ids_N)))
    return table
