"""Tables that have the columns which a log lacks: their rows by key, written once and looked up by all workers.

Letters of shapes: N rows of a piece of a log, T rows of a joined table.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featurestore.keys import NO_IMAGE
from pipeline.samples.mapping import IMAGE, KEY, Join

UNKNOWN = -1  # an id that a row does not have
MISSING: Mapping[str, Any] = {"image": NO_IMAGE, "profile": UNKNOWN, "measure": np.nan, "profiles": b""}
"""What a row has, by kind, whose item or user is not in the table."""


def differing_key(columns: Mapping[str, npt.NDArray[Any]]) -> int | None:
    """Return a key of several rows that differ in another column; None where there is none. All are sorted by KEY."""
    (again,) = np.nonzero(columns[KEY][1:] == columns[KEY][:-1])
    for values_T in columns.values():
        one, other = values_T[again], values_T[again + 1]
        is_other = one != other
        if values_T.dtype == np.float32:
            is_other &= ~(np.isnan(one) & np.isnan(other))
        if is_other.any():
            return int(columns[KEY][again[is_other.argmax()]])
    return None


def save(path: Path, columns: Mapping[str, npt.NDArray[Any]], names: pa.Table, texts: Mapping[int, str]) -> None:
    """Write the rows of a table, sorted by KEY, and next to them the names of its images and the texts of its ids."""
    rows = {
        name: pa.array(values_T, pa.binary() if values_T.dtype == np.object_ else None)
        for name, values_T in columns.items()
    }
    text_columns: dict[str, Any] = {"id": pa.array(texts, pa.int64()), "text": pa.array(texts.values(), pa.string())}
    named = ((_names_file(path), names.sort_by("key")), (_texts_file(path), pa.table(text_columns).sort_by("id")))
    for file, table in ((path, pa.table(rows)), *named):
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())


def look_up(
    join: Join, id_N: npt.NDArray[np.int64]
) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.bool_], pa.Table, dict[int, str]]:
    """Return the columns of the rows with these ids, (N,), and which ids the table has.

    And what is in these columns by name: images as a table, ids by their texts."""
    path = Path(join.path or "")
    table = _read(path)
    place_N, has_N = _places(table, KEY, id_N)
    rows = table.take(place_N[has_N])
    found = {}
    for name, kind in join.layout.kinds.items():
        if name != KEY:
            values = rows.column(name).to_numpy(zero_copy_only=False)
            found[name] = np.full(len(id_N), MISSING[kind], values.dtype)
            found[name][has_N] = values
    names = _read(_names_file(path))
    place_I, has_I = _places(names, "key", np.unique(found.get(IMAGE, id_N[:0])))
    return found, has_N, names.take(place_I[has_I]), _texts_of(path, [*found.values()])


def _texts_of(path: Path, columns: Sequence[npt.NDArray[Any]]) -> dict[int, str]:
    """Read the texts of the ids of some columns, lists of ids too."""
    table = _read(_texts_file(path))
    if not len(table):
        return {}
    flat = [
        np.frombuffer(b"".join(set(values_N.tolist())), np.int64) if values_N.dtype == np.object_ else values_N
        for values_N in columns
        if values_N.dtype in (np.object_, np.int64)
    ]
    place_U, has_U = _places(table, "id", np.unique(np.concatenate([np.empty(0, np.int64), *flat])))
    rows = table.take(place_U[has_U])
    ids, texts = (cast("list[Any]", rows.column(name).to_pylist()) for name in ("id", "text"))
    return dict(zip(ids, texts, strict=True))


def _names_file(path: Path) -> Path:
    return path.with_suffix(".names")


def _texts_file(path: Path) -> Path:
    return path.with_suffix(".texts")


def _read(path: Path) -> pa.Table:
    """Map a file of one batch into memory."""
    with pa.memory_map(str(path)) as mapped:
        return pa.ipc.open_file(mapped).read_all()


def _places(
    table: pa.Table, key: str, wanted_N: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Find the row of each key in a table that is sorted by it, and whether it has one."""
    if not len(table):
        return np.zeros(len(wanted_N), np.int64), np.zeros(len(wanted_N), np.bool_)
    keys_T = table.column(key).to_numpy()
    place_N = np.minimum(np.searchsorted(keys_T, wanted_N), len(keys_T) - 1)
    return place_N, keys_T[place_N] == wanted_N
