"""ids.parquet in a run's folder: the text of each hashed ID of the training samples, to look back.

Columns id, ascending, and text, in 64 row groups by the top bits of the ID; a whole number is its own ID and not in it.
Each rank collects what its share of the samples has and writes it in parts of the same 64 row groups; rank 0 merges
them, one row group after the other. So a rank holds `HELD` texts and rank 0 a 64th of all, however many there are.
"""

import contextlib
import itertools
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from featurestore.console.files import replaced_file
from featurestore.errors import StorageError
from featurestore.published.paths import FarPath, RunPath, open_file, remove_all, written_locally
from trainer.comm import Comm
from trainer.errors import DataError
from trainer.samples.columns import Rule
from trainer.samples.index import RowGroup, SampleIndex, read_texts

FILE = "ids.parquet"
HELD = 500_000
_BUCKET_BITS = 6
_FIELDS: list[Any] = [pa.field("id", pa.int64(), nullable=False), pa.field("text", pa.string(), nullable=False)]
_SCHEMA = pa.schema(_FIELDS)

Int64 = NDArray[np.int64]


def write_dictionary(
    comm: Comm, folder: RunPath, index: SampleIndex, rules: Mapping[str, Rule], earlier: RunPath | None = None
) -> bool:
    """Write `folder`/ids.parquet, the same for any number of ranks; return False if the samples have no texts.

    Every rank calls it; `folder` is one for all of them. `earlier`: the dictionary of a run whose ID rows this one
    begins with; its entries are taken in. Raises, on all ranks together, DataError where two texts have one ID, or
    where samples cannot be read, and OSError.
    """
    earlier_parts = [earlier] if earlier is not None and comm.on_rank_0(earlier.is_file) else []
    wanted = {column: rules[column] for column in sorted(index.text_columns)}
    if not wanted and not earlier_parts:
        return False
    scratch = folder / comm.broadcast_object(f".ids-{uuid.uuid4().hex}")

    def begin() -> None:
        for leftover in [each for each in folder.iterdir() if each.name.startswith(".ids-")]:
            remove_all(leftover)
        scratch.mkdir()

    comm.on_rank_0(begin)
    with comm.agreed(), written_locally(scratch) as local:
        collected = _collected(index, index.row_groups[comm.rank :: comm.size], wanted)
        for number, held in enumerate(collected):
            write_part(local / f"{comm.rank:05}-{number:05}.parquet", held)

    def publish() -> None:
        _merge([*scratch.iterdir(), *earlier_parts], folder)
        remove_all(scratch)

    comm.on_rank_0(publish)
    return True


@dataclass(frozen=True)
class IdDictionary:
    """The dictionary of a run."""

    path: RunPath

    @classmethod
    def of_run(cls, folder: RunPath) -> "IdDictionary | None":
        """Open the dictionary of the run in `folder`; None if its samples had no texts."""
        return cls(folder / FILE) if (folder / FILE).is_file() else None

    def texts(self, ids: Iterable[int]) -> dict[int, str]:
        """Find the texts of those of the IDs that are in it; reads the row groups that they are in.

        Raises DataError.
        """
        wanted_U = np.unique(np.fromiter(ids, np.int64))
        found: dict[int, str] = {}
        with _opened(self.path) as file:
            for bucket in np.unique(_buckets(wanted_U)).tolist():
                table = file.read_row_group(bucket)
                table = table.take(np.flatnonzero(np.isin(table["id"].to_numpy(), wanted_U)))
                found |= _entries(table)
        return found

    def first(self, count: int) -> tuple[list[tuple[int, str]], int]:
        """Read the first `count` entries, and how many there are in all. Raises DataError."""
        found: list[tuple[int, str]] = []
        with _opened(self.path) as file:
            for number in range(file.num_row_groups):
                found += _entries(file.read_row_group(number).slice(0, count - len(found)))
                if len(found) == count:
                    break
            return found, file.metadata.num_rows


def _collected(
    index: SampleIndex, row_groups: Iterable[RowGroup], rules: Mapping[str, Rule]
) -> Iterator[dict[int, str]]:
    """Texts by ID, about `HELD` at a time."""
    held: dict[int, str] = {}
    for encoded in read_texts(index, row_groups, rules):
        for number, text in zip(encoded.ids_U.tolist(), encoded.texts_U, strict=True):
            if str(number) != text:
                _check_one(number, held.setdefault(number, text), text)
        if len(held) >= HELD:
            yield held
            held = {}
    yield held


def _check_one(number: int, first: str, second: str) -> None:
    if first != second:
        raise DataError(f"id {number} is that of two texts of the samples, {first!r} and {second!r}: rename one")


def _buckets(ids_N: Int64) -> Int64:
    """The row group of each ID: its top bits, as a number from 0 on, so that all of one are below those of the next."""
    return (ids_N >> (64 - _BUCKET_BITS)) + (1 << (_BUCKET_BITS - 1))


def write_part(path: Path, held: Mapping[int, str]) -> None:
    """Write the texts of some IDs as a file of its own, in the form of ids.parquet.

    Within a row group they are in the order of `held`. Raises OSError.
    """
    ids_N = np.fromiter(held.keys(), np.int64, len(held))
    columns: list[Any] = [pa.array(ids_N), pa.array(list(held.values()), pa.string())]
    table = pa.Table.from_arrays(columns, schema=_SCHEMA)
    bucket_N = _buckets(ids_N)
    order = np.argsort(bucket_N, kind="stable")
    ends = np.searchsorted(bucket_N[order], np.arange((1 << _BUCKET_BITS) + 1))
    with _writer(path) as writer:
        for start, end in itertools.pairwise(ends):
            _write_bucket(writer, table.take(order[start:end]))


def _merge(parts: list[RunPath], folder: RunPath) -> None:
    """Merge the parts into `folder`/ids.parquet, which is there when it is complete."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_opened(part)) for part in sorted(parts, key=str)]
        local = stack.enter_context(written_locally(folder))
        writer = stack.enter_context(_writer(stack.enter_context(replaced_file(local / FILE))))
        for bucket in range(1 << _BUCKET_BITS):
            table = pa.concat_tables([file.read_row_group(bucket) for file in files]).sort_by("id")
            ids_N, texts = table["id"].to_numpy(), cast("Any", table["text"])
            again_K = np.flatnonzero(ids_N[1:] == ids_N[:-1]) + 1
            differing_K = pc.not_equal(texts.take(again_K - 1), texts.take(again_K)).to_numpy()
            for place in again_K[differing_K].tolist():
                _check_one(int(ids_N[place]), texts[place - 1].as_py(), texts[place].as_py())
            _write_bucket(writer, table.take(np.setdiff1d(np.arange(len(ids_N)), again_K)))


def _entries(table: pa.Table) -> list[tuple[int, str]]:
    ids, texts = (cast("list[Any]", table[name].to_pylist()) for name in ("id", "text"))
    return list(zip(ids, texts, strict=True))


def _writer(path: Path) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, _SCHEMA, compression="zstd", write_page_checksum=True)


def _write_bucket(writer: Any, table: pa.Table) -> None:
    writer.write_table(table, row_group_size=max(1, len(table)))


def _opened(path: RunPath) -> pq.ParquetFile:
    try:
        source: Any = open_file(path) if isinstance(path, FarPath) else path
        return pq.ParquetFile(source, page_checksum_verification=True)
    except (pa.ArrowException, OSError, StorageError) as failure:
        raise DataError(f"{path} is not a readable Parquet file: {str(failure).strip()}") from failure
