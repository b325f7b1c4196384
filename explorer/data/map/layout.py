"""A map for a page: one image for each cell of a grid, some points of all, and the colours of a quantity.

Letters of shapes: N points.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from explorer.data.map.points import MapPoints
from featurestore.keys import Int64Array

COLUMNS, ROWS = 12, 9
MOST_DRAWN = 3_000
"""Points that a browser draws one by one."""
_MOST_GROUPS = 9
OTHERS, NOTHING_KNOWN = "others", "no impressions"
Colour = Literal["folder", "category", "ctr", "error"]
COLOURS: dict[Colour, str] = {
    "folder": "folder of the image",
    "category": "category of the ad",
    "ctr": "CTR",
    "error": "error (log loss)",
}


class Cell(NamedTuple):
    """A cell of the grid that has images: its place from 1, the image nearest to its middle, and how many there are."""

    row: int
    column: int
    point: int
    images: int


@dataclass(frozen=True)
class Group:
    """Points of one colour."""

    name: str
    points: Int64Array


def cells(points: MapPoints) -> list[Cell]:
    """Choose an image for each cell of the grid, row by row; what lies far out is in the cells at the edge."""
    column_N, row_N = _scaled(points.x_N) * COLUMNS, (1 - _scaled(points.y_N)) * ROWS
    cell_column_N = np.minimum(column_N.astype(np.int64), COLUMNS - 1)
    cell_row_N = np.minimum(row_N.astype(np.int64), ROWS - 1)
    from_middle_N = (column_N - cell_column_N - 0.5) ** 2 + (row_N - cell_row_N - 0.5) ** 2
    cell_N = cell_row_N * COLUMNS + cell_column_N
    order_N = np.lexsort((points.keys_N, from_middle_N, cell_N))
    _, first, counts = np.unique(cell_N[order_N], return_index=True, return_counts=True)
    chosen = order_N[first]
    return [
        Cell(int(cell_row_N[point]) + 1, int(cell_column_N[point]) + 1, int(point), int(count))
        for point, count in zip(chosen, counts, strict=True)
    ]


def drawn(points: MapPoints) -> Int64Array:
    """Choose the points that are drawn, evenly."""
    count = len(points.keys_N)
    return np.unique(np.linspace(0, count - 1, min(count, MOST_DRAWN)).astype(np.int64))


def folder_of(uri: str) -> str:
    """Give the first part of an image's path; empty for one that is in no folder."""
    return uri.rpartition("://")[2].partition("/")[0] if "/" in uri else ""


def groups(names: Sequence[str], chosen: Int64Array) -> list[Group]:
    """Group chosen points by name, the largest groups first; those beyond nine together."""
    name_N = np.asarray(names, object)[chosen].astype(str)
    found, counts = np.unique(name_N, return_counts=True)
    large = [str(found[at]) for at in np.lexsort((found, -counts))[:_MOST_GROUPS]]
    made = [Group(name, chosen[name_N == name]) for name in large]
    rest = chosen[~np.isin(name_N, large)]
    return made + ([Group(OTHERS, rest)] if len(rest) else [])


def has(points: MapPoints, colour: Colour) -> bool:
    """Tell whether anything is known of the quantity."""
    values = {"ctr": points.ctr_N, "error": points.error_N}
    if colour in values:
        return bool(np.isfinite(values[colour]).any())
    names = points.category_N if colour == "category" else list(map(folder_of, points.uris_N))
    return len(set(names)) > 1


def _scaled(values_N: NDArray[np.float32]) -> NDArray[np.float64]:
    """Bring values to 0 to 1, but for one in a hundred at each end, which is at the edge."""
    low, high = np.quantile(values_N, [0.01, 0.99])
    if high <= low:
        return np.full(len(values_N), 0.5)
    scaled_N: NDArray[np.float64] = np.clip((values_N - low) / float(high - low), 0, 1)
    return scaled_N
