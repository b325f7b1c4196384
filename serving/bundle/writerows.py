"""Copies of a checkpoint's ID rows in the files of a bundle, written one shard at a time.

A checkpoint's `weight` is the value that a lookup would return at that step, even if rows in memory lag behind
(`trainer.ids.optimizers`). Letters of shapes: R rows of a shard, V numbers in a row.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from featurestore.keys import Int64Array, UInt64Array, splitmix64
from serving.bundle import RowDType
from serving.bundle.files import WrittenFiles
from serving.bundle.idrows import Bool, Float32, encoded
from serving.bundle.manifest import TRAINED, RowsFile, TableRows
from serving.errors import ServingError
from trainer.engine.choices import state_of
from trainer.engine.wiring import table_shapes
from trainer.ids.exact import IDS, ExactShape
from trainer.ids.shards import WEIGHT, TableShape, initial_rows
from trainer.models.layers import used_fields
from trainer.runs.checkpoint import read_rows
from trainer.runs.saved import SavedRun, finite


class ShardRows(NamedTuple):
    """The rows of one shard in the bundle's order: those of an exact table by hash, after the cold row."""

    rows_RV: Float32
    is_trained_R: Bool
    hash_M: UInt64Array
    """Hashes of the ids of an exact table, ascending; empty for other tables."""


class SavedTables:
    """The ID tables in a checkpoint of a run."""

    def __init__(self, saved: SavedRun) -> None:
        """Raises CheckpointError, SchemaError, ConfigError."""
        self._saved, self._config = saved, saved.config
        self.shapes = table_shapes(used_fields(saved.schema, self._config.model), self._config.model)
        state = state_of(self._config.optim)
        counts = [part for part in state if part.kind == "count"]  # alone has this, in few bytes
        self._marks = [part.name for part in counts or state]

    def shards(self, shape: TableShape) -> Iterator[ShardRows]:
        """Read a table's shards in order. Raises CheckpointError, and TrainerError if numbers are not finite."""
        is_exact = isinstance(shape, ExactShape)
        parts = [WEIGHT, IDS] if is_exact else [WEIGHT, *self._marks]
        names = [_name(shape, shard, part) for shard in range(shape.num_shards) for part in parts]
        with read_rows(self._saved.checkpoint, self._saved.state, names, self._saved.config.data.cache_dir) as read:
            for shard in range(shape.num_shards):
                weight_RV, *others = (read(_name(shape, shard, part)) for part in parts)
                finite(weight_RV.numpy())
                if is_exact:
                    yield _exact(weight_RV, others[0])
                else:
                    yield ShardRows(
                        weight_RV.float().numpy(),
                        self._is_trained(shape, shard, weight_RV, others),
                        np.empty(0, np.uint64),
                    )

    def _is_trained(self, shape: TableShape, shard: int, weight_RV: Tensor, marks: Sequence[Tensor]) -> Bool:
        """Return which rows training has touched, (N,).

        The optimiser's state shows it. For rows copied from another run their numbers show it, as they differ from this
        run's initial values."""
        trained_R = np.zeros(len(weight_RV), np.bool_)
        for mark in marks:
            trained_R |= mark.numpy().reshape(len(mark), -1).any(axis=1)
        epoch = self._saved.state.epoch if self._config.optim.ids_restart else 0
        moved_R = np.ones(len(weight_RV), np.bool_)
        for begun in {epoch, max(epoch - 1, 0)}:  # at the end of an epoch the next one's rows may not exist yet
            seed, scale = self._config.train.seed, self._config.model.id_init_std
            first_RV = initial_rows(shape, shard, seed, scale, begun).astype(weight_RV.numpy().dtype)
            moved_R &= (weight_RV.numpy() != first_RV).any(axis=1)
        return trained_R | moved_R


def rows_at(tables: SavedTables, asked: Mapping[int, Int64Array]) -> dict[int, Float32]:
    """Read the checkpoint's rows at the ascending positions `asked`, by the width of their file.

    Reads all tables of these widths once. Raises CheckpointError, TrainerError."""
    found: dict[int, Float32] = {}
    for width, place_U in asked.items():
        found[width], first_row = np.empty((len(place_U), width), np.float32), 0
        for shape in (shape for shape in tables.shapes if shape.width == width):
            for shard in tables.shards(shape):
                start, end = np.searchsorted(place_U, (first_row, first_row + len(shard.rows_RV)))
                found[width][start:end] = shard.rows_RV[place_U[start:end] - first_row]
                first_row += len(shard.rows_RV)
    return found


def write_rows(
    tables: SavedTables, files: WrittenFiles, dtype: RowDType
) -> tuple[tuple[TableRows, ...], tuple[RowsFile, ...]]:
    """Write the rows of all tables, one file for each width, and a bit for each row that training has touched.

    Raises CheckpointError, TrainerError, StorageError, and ServingError for numbers that do not fit the type."""
    written: list[TableRows] = []
    rows_files: list[RowsFile] = []
    bits: list[NDArray[np.uint8]] = []
    for width in dict.fromkeys(shape.width for shape in tables.shapes):
        name, first_row = f"ids-{width}.bin", 0
        trained: list[Bool] = []
        with files.output(name) as output:
            for shape in tables.shapes:
                if shape.width != width:
                    continue
                table = _write_table(tables, shape, first_row, dtype, files, output, trained)
                written.append(table)
                first_row += table.num_rows
        first_bit = 8 * sum(map(len, bits))
        rows_files.append(RowsFile(width=width, name=name, num_rows=first_row, first_bit=first_bit))
        bits.append(np.packbits(np.concatenate(trained), bitorder="little"))
    files.write(TRAINED, b"".join(part.tobytes() for part in bits))
    return tuple(written), tuple(rows_files)


def _write_table(
    tables: SavedTables,
    shape: TableShape,
    first_row: int,
    dtype: RowDType,
    files: WrittenFiles,
    output: IO[bytes],
    trained: list[Bool],
) -> TableRows:
    """Append the rows of one table, and append to `trained` which of them training has touched."""
    num_rows, hashes = 0, list[UInt64Array]()
    for shard in tables.shards(shape):
        rows = encoded(shard.rows_RV, dtype)
        if dtype == "float16" and not np.isfinite(rows).all():
            raise ServingError(f"table {shape.name} has numbers beyond float16, above 65,504: use --id-dtype float32")
        output.write(rows.tobytes())
        trained.append(shard.is_trained_R)
        hashes.append(shard.hash_M)
        num_rows += len(rows)
    is_exact = isinstance(shape, ExactShape)
    name = f"ids-{shape.name}.hashes.bin" if is_exact else None
    if name is not None:
        files.write(name, np.concatenate(hashes).astype("<u8").tobytes())
    return TableRows(
        name=shape.name,
        kind="exact" if is_exact else "direct" if shape.direct else "hashed",
        width=shape.width,
        num_shards=shape.num_shards,
        rows_per_shard=0 if is_exact else shape.rows_per_shard,
        num_rows=num_rows,
        first_row=first_row,
        hashes=name,
    )


def _exact(weight_RV: Tensor, ids_M: Tensor) -> ShardRows:
    hash_M = splitmix64(ids_M.numpy())
    order_M = np.argsort(hash_M)
    rows_RV = weight_RV.float().numpy()
    rows_RV = np.concatenate([rows_RV[:1], rows_RV[1:][order_M]])
    return ShardRows(rows_RV, np.arange(len(rows_RV)) > 0, hash_M[order_M])


def _name(shape: TableShape, shard: int, part: str) -> str:
    return f"{shape.name}/{shard:04d}/{part}"
