"""Parts: rows that distributed writers leave in the store until shards are built of them.

A part is sorted as shards are, by splitmix64, so the rows of one shard are neighbours and a few row groups hold them.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from featurestore.errors import InvalidRowsError
from featurestore.format.datafile import KEY, DataFile, encode, numpy_column, table_of
from featurestore.format.rows import FeatureRows
from featurestore.format.shard_reader import newest_rows, take_rows
from featurestore.keys import shard_of
from featurestore.spec import StoreInfo, check_file_name
from featurestore.storage.storage import Storage
from featurestore.storage.threads import in_threads

STAGING = "staging"
_GROUP_BYTES = 1 << 20
_SUFFIX = ".parquet"
_READ_THREADS = 8  # waiting for answers of an object store, not computing


def sorted_table(rows: FeatureRows, info: StoreInfo) -> pa.Table:
    """Return checked rows as a table in the order of splitmix64; of one key's rows the last stays."""
    rows.validate(info)
    return take_rows(table_of(rows, info), newest_rows(rows.keys_N))


def stage_part(storage: Storage, info: StoreInfo, run_id: str, part: str, rows: FeatureRows) -> None:
    """Write a part, whole or not at all; the same part again replaces it."""
    data = encode(sorted_table(rows, info), info, _GROUP_BYTES)
    with storage.open_output(_part_path(run_id, part)) as file:
        file.write(memoryview(data))


def staged_parts(storage: Storage, run_id: str) -> list[str]:
    """List the names of the complete parts of a run, sorted."""
    names = storage.list(f"{STAGING}/{_checked(run_id)}")
    return [name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)]


def discard_part(storage: Storage, run_id: str, part: str) -> None:
    """Remove one part of a run."""
    storage.delete(_part_path(run_id, part))


def discard(storage: Storage, run_id: str) -> None:
    """Remove all parts of a run."""
    storage.delete(f"{STAGING}/{_checked(run_id)}")


def read_shards_of_parts(
    storage: Storage, info: StoreInfo, run_id: str, parts: Sequence[str], shards: range
) -> dict[int, pa.Table]:
    """Read the rows of some neighbouring shards in all `parts`, in their order, by shard.

    Shards without rows are absent. Each part is opened once, 8 of them at a time. In memory are all these rows, and of
    the parts being read the row groups around them: about 2 MB more than the rows each. Raises InvalidRowsError where a
    part is not there.
    """
    found: dict[int, list[pa.Table]] = {}
    paths = [_part_path(run_id, part) for part in parts]
    for table in in_threads(lambda path: _read_part(storage, info, path, shards), paths, _READ_THREADS):
        for shard, rows in cut(table, info).items():
            found.setdefault(shard, []).append(rows)
    return {shard: pa.concat_tables(found[shard]) for shard in sorted(found)}


def cut(table: pa.Table, info: StoreInfo) -> dict[int, pa.Table]:
    """Return the rows of each shard, of a table in the order of splitmix64; nothing is copied."""
    shard_N = shard_of(numpy_column(table, KEY), info.num_shards)  # ascending, as the hashes are
    shards, starts = np.unique(shard_N, return_index=True)
    ends = np.append(starts, len(shard_N))[1:]
    return {int(s): table.slice(start, end - start) for s, start, end in zip(shards, starts, ends, strict=True)}


def _read_part(storage: Storage, info: StoreInfo, path: str, shards: range) -> pa.Table:
    try:
        source = storage.open_input(path)
    except FileNotFoundError as error:
        raise InvalidRowsError(
            f"{storage.full(path)} was never staged, or has been discarded: two runs of the same job on one store at a"
            " time share their parts, and the first to end discards them. Run one at a time; run this again"
        ) from error
    with source:
        file = DataFile(source, info, storage.full(path))
        shard_N = shard_of(numpy_column(file.read([KEY]), KEY), info.num_shards)
        start, end = (int(np.searchsorted(shard_N, s)) for s in (shards.start, shards.stop))
        starts = file.group_starts
        groups = [g for g in range(len(starts) - 1) if starts[g] < end and starts[g + 1] > start]
        first = starts[groups[0]] if groups else 0
        # A slice would keep whole groups in memory, and of a small share of the shards that is most of every part.
        return take_rows(file.read(groups=groups), np.arange(start - first, end - first))


def _part_path(run_id: str, part: str) -> str:
    return f"{STAGING}/{_checked(run_id)}/{_checked(part)}{_SUFFIX}"


def _checked(name: str) -> str:
    try:
        return check_file_name(name)
    except ValueError as error:
        raise InvalidRowsError(f"a run or a part cannot have this name: {error}") from error
