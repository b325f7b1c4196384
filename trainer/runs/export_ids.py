"""The ids of an exact table and their vectors, out of a checkpoint into one Parquet file, shard by shard.

No engine is built, and no more than a shard is in memory. Who looks ids up in the file does as the trainer does: an id
that is not in it has the cold row of its shard, `shard_of(id, num_shards)` (docs/ID_TABLES.md).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.storage.storage import Storage
from trainer.config.options import ExactTableConfig
from trainer.errors import ConfigError
from trainer.ids.exact import IDS, LAST_USE
from trainer.ids.rows import WEIGHT
from trainer.runs.checkpoint import read_rows
from trainer.runs.saved import SavedRun, finite, read_run

ROWS_OF = "id_rows"
"""Name of the metadata that say of what the rows are."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SavedTable:
    """An exact table of a run, as one of its checkpoints has it."""

    saved: SavedRun
    name: str

    @property
    def num_shards(self) -> int:
        """Shards of every table of the run."""
        return self.saved.config.model.table_shards

    def describe(self) -> dict[str, Any]:
        """What its rows are of."""
        return {
            **self.saved.named(),
            "table": self.name,
            "num_shards": self.num_shards,
        }

    def shards(self) -> Iterator[pa.Table]:
        """Columns id, shard, last_use and vector of each shard; first its cold row, whose id is null. Raises
        CheckpointError, and TrainerError for a number that is not finite."""
        parts = [f"{self.name}/{shard:04d}/{part}" for shard in range(self.num_shards) for part in _PARTS]
        with read_rows(self.saved.path, self.saved.state, parts) as read:
            for shard in range(self.num_shards):
                ids_N, last_use_N, vectors_NV = (read(f"{self.name}/{shard:04d}/{part}").numpy() for part in _PARTS)
                yield _table(shard, ids_N, last_use_N, finite(vectors_NV.astype(np.float32)))


_PARTS = (IDS, LAST_USE, WEIGHT)


def open_table(folder: Path, name: str | None = None, which: str | None = None) -> SavedTable:
    """An exact table of the run in `folder`, as the checkpoint `which` has it (see `find_checkpoint`).

    `name` may be left out where the run has one alone. Raises ConfigError, CheckpointError.
    """
    saved = read_run(folder, which)
    exact = [table for table, settings in saved.config.model.tables.items() if isinstance(settings, ExactTableConfig)]
    if not exact:
        raise ConfigError(f"{folder} has no exact ID table (model.tables.NAME={{kind: exact, ...}}); name another run")
    if name is None and len(exact) == 1:
        return SavedTable(saved, exact[0])
    if name not in exact:
        asked = "choose one by" if name is None else f"none of them is {name}:"
        raise ConfigError(f"{folder} has the exact ID tables {', '.join(exact)}; {asked} --table")
    return SavedTable(saved, name)


def export_table(table: SavedTable, out: str, progress: Progress = lambda done, total: None) -> int:
    """Writes all rows to `out`, NAME.parquet, and returns how many ids there are. `progress` is told shards done and
    all of them. The file gets its name when it is whole. Raises TrainerError, FeatureStoreError."""
    folder, slash, name = out.rpartition("/")
    storage, count, writer = Storage(folder or slash or "."), 0, None
    with storage.open_output(name) as output:
        for number, rows in enumerate(table.shards(), 1):
            if writer is None:
                described = {ROWS_OF: json.dumps(table.describe())}
                writer = pq.ParquetWriter(output, rows.schema.with_metadata(described), compression="lz4")
            writer.write_table(rows)
            count += len(rows) - 1
            progress(number, table.num_shards)
        assert writer is not None
        writer.close()
    return count


def _table(shard: int, ids_N: Any, last_use_N: Any, vectors_NV: Any) -> pa.Table:
    vectors: Any = pa.FixedSizeListArray.from_arrays(pa.array(vectors_NV.reshape(-1)), vectors_NV.shape[1])
    no_id: Any = pa.array([None], pa.int64())
    columns: dict[str, Any] = {
        "id": pa.concat_arrays([no_id, pa.array(ids_N)]),
        "shard": pa.array(np.full(len(vectors_NV), shard, np.int32)),
        "last_use": pa.array(last_use_N, pa.int32()).cast(pa.date32()),
        "vector": vectors,
    }
    return pa.table(columns)
