"""Live rows as Arrow record batches, for other libraries and languages: the vectors as float32 lists, or as stored.

Letters of shapes: N rows of a batch, D feature width.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from featurestore.format.codec import Codec
from featurestore.format.datafile import FEATURE, METADATA_COLUMNS, matrix_of, schema_of
from featurestore.format.shard_reader import ShardReader
from featurestore.spec import StoreInfo

LIVE_COLUMNS = [*METADATA_COLUMNS, FEATURE]


def live_schema(info: StoreInfo, columns: Sequence[str] | None = None, decode: bool = True) -> pa.Schema:
    """Return the columns of `live_batches`: LIVE_COLUMNS by default. Raises ValueError for a column of another name."""
    names = LIVE_COLUMNS if columns is None else list(columns)
    unknown = [name for name in names if name not in LIVE_COLUMNS]
    if unknown or not names or len(set(names)) != len(names):
        raise ValueError(f"columns={names}: choose from {', '.join(LIVE_COLUMNS)}, each once, one at least")
    fields = {field.name: field for field in schema_of(info)}
    if decode:
        fields[FEATURE] = pa.field(FEATURE, pa.list_(pa.float32(), info.dim), nullable=False)
    return pa.schema([fields[name] for name in names])


def live_batches(
    reader: ShardReader, codec: Codec, columns: Sequence[str] | None = None, decode: bool = True
) -> Iterator[pa.RecordBatch]:
    """Read columns of the live rows of a shard, a few megabytes at a time, file by file, the oldest first.

    `decode` makes the features fixed-size lists of float32; else they are bytes as stored. Only the columns asked for
    are read, and of more than one file key and tombstones. Raises ValueError, CorruptFileError.
    """
    schema = live_schema(reader.info, columns, decode)
    for table in reader.live_tables(schema.names):
        arrays: list[Any] = table.columns
        if decode and FEATURE in schema.names:
            values_ND = codec.decode(matrix_of(table, reader.info))
            feature = pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(values_ND)), reader.info.dim)
            arrays[schema.names.index(FEATURE)] = feature
        yield from pa.Table.from_arrays(arrays, schema=schema).to_batches()
