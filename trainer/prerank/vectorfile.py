"""Keys and vectors as Parquet: a later row of a key counts, and one without a vector removes the key.

Letters of shapes: N rows, W width of the vectors.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from featurestore.errors import CorruptFileError

KEY, VECTOR = "key", "vector"
Keys = NDArray[np.int64]
Vectors = NDArray[np.float32]
Mask = NDArray[np.bool_]


def to_parquet(keys_N: Keys, vectors_NW: Vectors, removed_R: Keys | None = None) -> bytes:
    """Write columns key and vector, removed keys last; dtype and shape of the vector are in its field's metadata."""
    width, removed_R = vectors_NW.shape[1], np.empty(0, np.int64) if removed_R is None else removed_R
    values = np.concatenate([vectors_NW, np.zeros((len(removed_R), width), np.float32)]).astype(np.float32)
    has_vector_N = np.arange(len(values)) < len(keys_N)
    valid = pa.array(has_vector_N).buffers()[1] if len(removed_R) else None
    vector = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(4 * width), len(values), [valid, pa.py_buffer(values.tobytes())]
    )
    field = pa.field(VECTOR, vector.type)
    schema = pa.schema(
        [
            pa.field(KEY, pa.int64(), nullable=False),
            field.with_metadata({"dtype": "float32", "shape": f"[{width}]"}),
        ]
    )
    sink = pa.BufferOutputStream()
    columns: list[Any] = [pa.array(np.concatenate([keys_N, removed_R])), vector]
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), sink, compression="lz4", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def from_parquet(data: bytes, width: int, path: str) -> tuple[Keys, Vectors, Mask]:
    """Read what `to_parquet` wrote: keys (N,), vectors (N, W), and which rows have one (N,).

    Raises CorruptFileError.
    """
    table = pq.read_table(pa.BufferReader(data)).combine_chunks()
    vector: Any = table[VECTOR].combine_chunks()
    if vector.type != pa.binary(4 * width):
        raise CorruptFileError(f"{path} has vectors of {vector.type}, not {width} numbers of float32")
    has_vector_N = vector.is_valid().to_numpy(zero_copy_only=False)
    values = np.frombuffer(vector.buffers()[1], np.float32).reshape(-1, width)
    return table[KEY].to_numpy(), values[vector.offset : vector.offset + len(vector)], has_vector_N


def merge(parts: Sequence[tuple[Keys, Vectors, Mask]]) -> tuple[Keys, Vectors]:
    """Merge several files, oldest first, into keys, ascending, and their vectors."""
    keys_N, vectors_NW, has_vector_N = (np.concatenate(each) for each in zip(*parts, strict=True))
    last_M = len(keys_N) - 1 - np.unique(keys_N[::-1], return_index=True)[1]
    last_M = last_M[has_vector_N[last_M]]
    return keys_N[last_M], vectors_NW[last_M]
