"""The rows of the logs by user: each piece of a log becomes one file with a batch per bucket of users.

The files are Arrow IPC files in a folder that all workers see; batch b is bucket b, so a bucket is read without the
rest.
"""

import contextlib
import itertools
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.keys import NO_IMAGE, splitmix64
from featurestore.storage.storage import Storage
from pipeline.samples.logs import NAMES, Columns, read_piece
from pipeline.samples.pieces import BEHAVIORS, LogPiece

_QUARANTINE_TYPES: dict[str, pa.DataType] = {
    "log": pa.string(),
    "file": pa.string(),
    "row": pa.int64(),  # in the file, the first is 0
    "reason": pa.string(),
}
QUARANTINE = pa.schema(_QUARANTINE_TYPES)
_NAME_BUCKETS = 256


@dataclass(frozen=True)
class ShuffledPiece:
    """The outcome of shuffling one piece."""

    num_rows: int
    num_short: int  # behaviours below the least dwell time
    quarantined: Counter[str]  # rows for each reason
    quarantine_path: str | None
    examples: Mapping[str, str]  # a bad value by reason
    num_without_image: int  # good rows
    names_path: str | None  # what its images are called


def shuffle_pieces(
    pieces: Sequence[LogPiece],
    first: int,
    folder: str,
    num_buckets: int,
    min_dwell_s: float,
    latest_s: int,
    compress: bool,
) -> list[ShuffledPiece]:
    """Shuffle pieces one after the other, the first of which has number `first`. Raises SampleError."""
    return [
        shuffle_piece(piece, index, folder, num_buckets, min_dwell_s, latest_s, compress)
        for index, piece in enumerate(pieces, first)
    ]


def shuffle_piece(
    piece: LogPiece, index: int, folder: str, num_buckets: int, min_dwell_s: float, latest_s: int, compress: bool
) -> ShuffledPiece:
    """Read one piece and write its good rows by bucket, and the bad ones to a file. Raises SampleError."""
    rows = read_piece(piece, latest_s)
    columns = rows.good
    num_short = 0
    if piece.log == BEHAVIORS:
        is_long_N = columns.pop("dwell_s") >= min_dwell_s
        num_short = int(np.count_nonzero(~is_long_N))
        columns = {name: values_N[is_long_N] for name, values_N in columns.items()}
    path = _path(folder, piece.log, index)
    write_batches(path, _buckets(columns, num_buckets), compress)
    quarantine_path = None
    if rows.bad_reason:
        quarantine_path = path.with_suffix(".bad")
        bad = [
            {"log": piece.log, "file": piece.path, "row": row, "reason": reason}
            for row, reason in zip(rows.bad_row.tolist(), rows.bad_reason, strict=True)
        ]
        write_batches(quarantine_path, [pa.RecordBatch.from_pylist(bad, schema=QUARANTINE)], compress)
    return ShuffledPiece(
        rows.num_rows,
        num_short,
        Counter(rows.bad_reason),
        None if quarantine_path is None else str(quarantine_path),
        rows.examples,
        int(np.count_nonzero(columns["image"] == NO_IMAGE)),
        _write_names(path.with_suffix(".names"), rows.names, compress),
    )


def read_bucket(folder: str, log: str, num_pieces: int, bucket: int) -> Columns:
    """Read all rows of a bucket from the pieces 0 to `num_pieces` of a log, in no order."""
    batches = [read_batch(str(_path(folder, log, index)), bucket) for index in range(num_pieces)]
    return {
        name: np.concatenate([batch.column(name).to_numpy() for batch in batches]) for name in batches[0].schema.names
    }


def write_quarantine(path: Path, parts: Sequence[ShuffledPiece]) -> None:
    """Write all bad rows of the logs as one Parquet file, in the order of the parts; empty where none is."""
    with pq.ParquetWriter(path, QUARANTINE) as writer:
        for part in parts:
            if part.quarantine_path is not None:
                writer.write_batch(read_batch(part.quarantine_path, 0))


def _write_names(path: Path, names: pa.Table, compress: bool) -> str | None:
    if not len(names):
        return None
    bucket_N = _name_bucket(names.column("key").to_numpy())
    names = names.take(np.argsort(bucket_N, kind="stable")).combine_chunks()
    edges = np.searchsorted(np.sort(bucket_N), np.arange(_NAME_BUCKETS + 1)).tolist()
    batches = names.to_batches()[0]
    write_batches(path, [batches.slice(low, high - low) for low, high in itertools.pairwise(edges)], compress)
    return str(path)


def _name_bucket(keys_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the top bits of each key, as a number from 0 on: all keys of one are below those of the next."""
    bucket_N: npt.NDArray[np.int64] = (keys_N >> 56) + _NAME_BUCKETS // 2
    return bucket_N


def write_names(path: Path, parts: Sequence[ShuffledPiece], before: Storage | None = None) -> None:
    """Write what the images of all pieces, and of the samples `before`, are called; no file where none has a name.

    By key, in a row group for each of 256 ranges of keys; in memory are the names of one range.
    """
    paths = [part.names_path for part in parts if part.names_path is not None]
    with contextlib.ExitStack() as opened:
        old = None
        if before is not None:
            with contextlib.suppress(FileNotFoundError):
                file = opened.enter_context(before.open_input(path.name))
                old = opened.enter_context(pq.ParquetFile(file, page_checksum_verification=True))
        if not paths and old is None:
            return
        writer = opened.enter_context(pq.ParquetWriter(path, NAMES, compression="zstd", write_page_checksum=True))
        for bucket in range(_NAME_BUCKETS):
            known = [] if old is None else [old.read_row_group(bucket).cast(NAMES)]
            names = pa.concat_tables([*known, *(pa.Table.from_batches([read_batch(each, bucket)]) for each in paths)])
            names = names.group_by("key").aggregate([("uri", "min")]).sort_by("key").rename_columns(NAMES.names)
            writer.write_table(names.cast(NAMES), row_group_size=max(1, len(names)))


def _path(folder: str, log: str, index: int) -> Path:
    return Path(folder, f"{log}-{index:06d}.arrow")


def _buckets(columns: Columns, num_buckets: int) -> Iterable[pa.RecordBatch]:
    bucket_N = splitmix64(columns["user"]) % np.uint64(num_buckets)
    order_N = np.argsort(bucket_N, kind="stable")
    table = pa.record_batch({name: pa.array(values_N[order_N]) for name, values_N in columns.items()})
    edges = np.searchsorted(bucket_N[order_N], np.arange(num_buckets + 1, dtype=np.uint64))
    return [table.slice(low, high - low) for low, high in itertools.pairwise(edges.tolist())]


def write_batches(path: Path, batches: Iterable[pa.RecordBatch], compress: bool) -> None:
    """Write one Arrow file of `batches` (at least one), named only once it is whole: a task may run twice.

    `compress` by LZ4: half the bytes, for an eighth more of the time that all of a day takes.
    """
    iterator = iter(batches)
    first = next(iterator)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    options = pa.ipc.IpcWriteOptions(compression="lz4" if compress else None, use_threads=False)
    with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, first.schema, options=options) as writer:
        writer.write_batch(first)
        for batch in iterator:
            writer.write_batch(batch)
    temporary.replace(path)


def read_batch(path: str, index: int) -> pa.RecordBatch:
    """Read batch `index` of a file of write_batches, without reading the others."""
    with pa.memory_map(path) as file:
        return pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(use_threads=False)).get_batch(index)
