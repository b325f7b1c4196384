"""A map: images as points of a plane, close together if their vectors are, with the click rate of each as an ad.

Points are stored as Parquet with their vectors, which embedding-atlas opens and lays out by UMAP.

Letters of shapes: N images that are drawn, which are the points; V width of their vectors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from explorer.data.ads import AdFigures, ad_figures
from explorer.data.background import Task
from explorer.data.cache import TableCache, about_of, described, digest_of
from explorer.data.visual import vectors_in, visual_vectors
from explorer.errors import ExplorerError
from explorer.places import Places
from explorer.problems import Problem
from featurestore.format.datafile import KEY, URI
from featurestore.keys import Int64Array

MOST_POINTS = 20_000
FILES = TableCache("map-", ".parquet", most=200)


@dataclass(frozen=True, kw_only=True)
class MapPoints:
    """Images in the plane. `ctr_N` is NaN without impressions, a category empty where samples have none."""

    keys_N: Int64Array
    uris_N: list[str]
    x_N: NDArray[np.float32]
    y_N: NDArray[np.float32]
    ctr_N: NDArray[np.float32]
    impressions_N: Int64Array
    category_N: list[str]
    about: dict[str, Any]
    """run, network and all networks of it, num_images (of which the points are a sample), the id of the store that has
    the images, and notes, sentences for the page."""
    file: Path
    """The Parquet file of the points."""

    @property
    def size_bytes(self) -> int:
        """The memory that they take, roughly."""
        return 300 * len(self.keys_N)


def make_map(places: Places, run: str, task: Task[Any], network: str | None = None) -> MapPoints:
    """Lay out the visual vectors of a run's newest checkpoint, and join the click rates; or read the cached points.

    `network`: which E, by its store, of a run that has several, by default the first. Takes every k-th image of the
    store if there are many. Missing samples are mentioned in the notes. Raises ExplorerError if the run has no such E,
    and the errors of visual vectors.
    """
    from trainer.runs.saved import network_widths, read_run

    doing = f"computes the visual vectors of {run}"
    task.tell(doing)
    saved = read_run(places.run(run), None, places.samples)
    networks = [*network_widths(saved)]
    if not networks:
        raise ExplorerError(Problem.NO_IMAGES, run)
    if network is not None and network not in networks:
        raise ExplorerError(Problem.NO_CONTENT, run, network[:80], ", ".join(networks))
    found = visual_vectors(
        places.run(run),
        store=places.store,
        network=network or networks[0],
        progress=lambda done, total: task.tell(doing, done, total),
    )
    task.tell("reads the test samples")
    figures = ad_figures(saved, places.samples, task)
    about = {**found.about, "of": f"visual vectors of {found.about['checkpoint']}", "run": run, "networks": networks}
    about |= {"num_images": len(found.table), "notes": [figures.note] if figures.note else []}
    counted = [int(figures.impressions_I.sum()), int(figures.clicks_I.sum())]
    digest = digest_of([about, found.digest, places.samples or saved.config.data.samples, counted])

    def laid_out() -> Iterator[pa.Table]:
        task.tell("lays out the images")
        table = _points(found.table.take(evenly(len(found.table), MOST_POINTS)), figures)
        yield table.cast(described(table.schema, about))

    return _read(FILES.get(digest, laid_out), FILES.path(digest))


def _points(images: pa.Table, figures: AdFigures) -> pa.Table:
    """Lay out images by their vectors, and join the figures of ads."""
    plane_N2 = principal(vectors_in(images))
    figures = figures.of(images[KEY].to_numpy())
    columns: dict[str, Any] = {
        "key": images[KEY],
        "uri": images[URI],
        "x": pa.array(plane_N2[:, 0]),
        "y": pa.array(plane_N2[:, 1]),
        "ctr": pa.array(figures.ctrs),
        "impressions": pa.array(figures.impressions_I),
        "category": pa.array(figures.category_I, pa.string()),
        "vector": images["vector"],
    }
    return pa.table(columns)


def evenly(count: int, most: int) -> Int64Array:
    """Choose at most `most` of `count` rows, evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def principal(vectors_NV: NDArray[np.float32]) -> NDArray[np.float32]:
    """Project on the two directions of most variance, (N, 2): some milliseconds for thousands."""
    if len(vectors_NV) < 2 or vectors_NV.shape[1] < 2:
        return np.concatenate([vectors_NV[:, :1], np.zeros((len(vectors_NV), 1), np.float32)], axis=1)
    centred_NV = vectors_NV - vectors_NV.mean(axis=0)
    _, _, axes = np.linalg.svd(centred_NV, full_matrices=False)
    plane_N2: NDArray[np.float32] = centred_NV @ axes[:2].T
    return plane_N2


def _read(table: pa.Table, file: Path) -> MapPoints:
    columns: dict[str, Any] = {f"{name}_N": table[name].to_numpy() for name in ("x", "y", "ctr", "impressions")}
    columns |= {"uris_N": table["uri"].to_pylist(), "category_N": table["category"].to_pylist()}
    return MapPoints(keys_N=table["key"].to_numpy(), **columns, about=about_of(table), file=file)


COLUMNS, ROWS = 12, 9
MOST_DRAWN = 3_000
"""Points that a browser draws one by one."""
_MOST_GROUPS = 9
OTHERS = "others"
Colour = Literal["folder", "category", "ctr"]
COLOURS: dict[Colour, str] = {"folder": "folder of the image", "category": "category of the ad", "ctr": "CTR"}


class Cell(NamedTuple):
    """A cell of the grid with images: its position from 1, the image nearest to its centre, and their number."""

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
    """Choose an image for each cell of the grid, row by row; outliers belong to the cells at the edge."""
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
    return evenly(len(points.keys_N), MOST_DRAWN)


def folder_of(uri: str) -> str:
    """Return the first folder of an image's path, or an empty text."""
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
    """Return whether any point has a value of the quantity."""
    return bool(np.isfinite(points.ctr_N).any()) if colour == "ctr" else len(set(names_of(points, colour))) > 1


def names_of(points: MapPoints, colour: Colour) -> list[str]:
    """Return the name of each point's group: its folder or category."""
    if colour == "category":
        return [each or "no category" for each in points.category_N]
    return [folder_of(uri) or "no folder" for uri in points.uris_N]


def matching(points: MapPoints, text: str) -> Int64Array:
    """Find the points whose uri has a text, ignoring case, or whose key it is."""
    wanted = text.lower()
    found = [wanted in uri.lower() or text == str(key) for uri, key in zip(points.uris_N, points.keys_N, strict=True)]
    return np.flatnonzero(found)


def _scaled(values_N: NDArray[np.float32]) -> NDArray[np.float64]:
    """Scale values to 0 to 1, clipping one in a hundred at each end."""
    low, high = np.quantile(values_N, [0.01, 0.99])
    if high <= low:
        return np.full(len(values_N), 0.5)
    scaled_N: NDArray[np.float64] = np.clip((values_N - low) / float(high - low), 0, 1)
    return scaled_N
