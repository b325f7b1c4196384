"""Files of keys or uris that a person gives to a command: images to look for, or to remove."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.errors import KeyFileError
from featurestore.format.datafile import KEY, URI
from featurestore.keys import Int64Array, keys_of_uris
from featurestore.storage.regular import read_regular, read_text


def read_keys(file: Path) -> Int64Array:
    """Read keys of images, ascending, each once.

    The file has a whole number on each line, or is an int64 .npy, or a .parquet with the column `key`. Raises
    KeyFileError where there is none, or something else."""
    try:
        if file.suffix == ".npy":
            keys = np.load(file, allow_pickle=False)
        elif file.suffix == ".parquet":
            keys = _column(file, KEY).to_numpy(zero_copy_only=False)
        else:
            keys = np.array([*map(_key, _numbered_lines(file))], np.int64)
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        raise KeyFileError(f"{file} is no file of keys: {error}") from error
    if not keys.size:
        raise KeyFileError(f"{file} has no keys: name a file with one at least")
    if keys.dtype != np.int64 or keys.ndim != 1:
        raise KeyFileError(f"{file} has {keys.dtype} of shape {keys.shape}: keys are one list of int64")
    return np.unique(keys)


def read_uris(file: Path) -> list[str]:
    """Read uris of images, each once: one on each line, or the column `uri` of a .parquet. Raises KeyFileError."""
    try:
        uris: list[str | None] = _column(file, URI).to_pylist() if file.suffix == ".parquet" else [*_lines(file)]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise KeyFileError(f"{file} is no file of uris: {error}") from error
    named = [uri for uri in uris if uri]
    if not named or len(named) < len(uris):
        raise KeyFileError(f"{file} has no uris, or an empty one")
    return list(dict.fromkeys(named))


def read_names(file: Path) -> tuple[Int64Array, list[str]]:
    """Read a file of keys, or of uris; return the keys (N,), ascending, and the uris where it has those.

    It has keys where it is a .npy, has a column `key`, or where each line is a whole number. Raises KeyFileError."""
    try:
        if file.suffix == ".parquet":
            has_uris = KEY not in pq.read_schema(file).names
        else:
            has_uris = file.suffix != ".npy" and not all(_is_number(line) for line in _lines(file))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise KeyFileError(f"{file} is no file of keys or uris: {error}") from error
    if has_uris:
        uris = read_uris(file)
        return np.unique(keys_of_uris(uris)), uris
    return read_keys(file), []


def _lines(file: Path) -> list[str]:
    return [line for _, line in _numbered_lines(file)]


def _numbered_lines(file: Path) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(read_text(file).splitlines(), 1) if line.strip()]


def _key(numbered: tuple[int, str]) -> int:
    number, line = numbered
    if not _is_number(line):
        raise ValueError(f"line {number:,} is no whole number: {line[:80]!r}; if these are uris, give them by --uris")
    return int(line)


def _column(file: Path, name: str) -> Any:
    table = pq.read_table(pa.BufferReader(read_regular(file)), columns=[name])
    if name not in table.column_names:
        raise ValueError(f"it has no column {name}")
    return table[name]


def _is_number(line: str) -> bool:
    try:
        int(line)
    except ValueError:
        return False
    return True
