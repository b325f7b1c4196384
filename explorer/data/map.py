"""A map: images as points of a plane, close together if their vectors are, with the click rate of each as an ad.

Points are stored as Parquet with their vectors, which embedding-atlas opens and lays out by UMAP.

Letters of shapes: N images that are drawn, which are the points; V width of their vectors; I different ad images.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from explorer.data.background import Task
from explorer.data.cache import FileCache
from explorer.data.visual import visual_vectors
from explorer.errors import ExplorerError
from explorer.places import Places
from featurestore.console.files import replaced_file
from featurestore.errors import UserError
from featurestore.keys import Int64Array
from featurestore.text import one_line

if TYPE_CHECKING:
    from trainer.runs.saved import SavedRun
    from trainer.samples.index import SampleIndex
    from trainer.schema import Schema


MOST_POINTS = 20_000
MOST_IMPRESSIONS = 2_000_000
"""Most impressions to read; of more, row groups are left out evenly."""
_FILES = FileCache("map-", ".parquet", most=32)
_ABOUT = b"explorer_map"


@dataclass(frozen=True, kw_only=True)
class MapPoints:
    """Images in the plane. `ctr_N` is NaN without impressions."""

    keys_N: Int64Array
    uris_N: list[str]
    x_N: NDArray[np.float32]
    y_N: NDArray[np.float32]
    ctr_N: NDArray[np.float32]
    impressions_N: Int64Array
    about: dict[str, Any]
    """run, network and all networks of it, num_images (of which the points are a sample), the id of the store that has
    the images, and notes, sentences for the page."""
    file: Path
    """The Parquet file of the points."""


def make_map(places: Places, run: str, task: Task[Any], network: str | None = None) -> MapPoints:
    """Lay out the visual vectors of a run's newest checkpoint, and join the click rates; or read the cached points.

    `network`: which E, STORE:NAME, of a run that has several, by default the first. Takes every k-th image of the store
    if there are many. Missing samples are mentioned in the notes. Raises ExplorerError if the run has no such E, and
    the errors of visual vectors.
    """
    from trainer.runs.export import network_widths
    from trainer.runs.saved import read_run

    doing = f"computes the visual vectors of {run}"
    task.tell(doing)
    saved = read_run(places.run(run), None, places.samples)
    networks = [":".join(each) for each in network_widths(saved)]
    if not networks:
        raise ExplorerError(
            f"the run {run} has model.images=none: it has no E for images, so no map; choose another run"
        )
    if network is not None and network not in networks:
        raise ExplorerError(f"the run {run} has no content {network[:80]!r}; it has {', '.join(networks)}")
    found = visual_vectors(
        places.run(run),
        store=places.store,
        network=network or networks[0],
        progress=lambda done, total: task.tell(doing, done, total),
    )
    made_of = [found.digest, _files_of(places.samples or saved.config.data.samples), networks]
    file = _FILES.path(hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:24])
    if (known := read_points(file)) is not None:
        return known
    task.tell("lays out the images")
    row_N = evenly(len(found.keys_N), MOST_POINTS)
    keys_N, vectors_NV = found.keys_N[row_N], found.vectors_NV[row_N]
    plane_N2 = principal(vectors_NV)
    task.tell("reads the test samples")
    impressions_N, clicks_N, notes = _counts(places, saved, keys_N)
    with np.errstate(invalid="ignore"):
        ctr_N = (clicks_N / impressions_N).astype(np.float32)
    about = {**found.about, "of": f"visual vectors of {found.about['checkpoint']}", "run": run, "notes": notes}
    about |= {"num_images": len(found.keys_N), "networks": networks}
    columns: dict[str, Any] = {
        "key": pa.array(keys_N),
        "uri": pa.array([str(each) for each in found.uris_N.take(row_N).to_pylist()], pa.string()),
        "x": pa.array(plane_N2[:, 0]),
        "y": pa.array(plane_N2[:, 1]),
        "ctr": pa.array(ctr_N),
        "impressions": pa.array(impressions_N),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors_NV.reshape(-1)), vectors_NV.shape[1]),
    }
    with replaced_file(file) as part:
        table = pa.table(columns).replace_schema_metadata({_ABOUT: json.dumps(about)})
        pq.write_table(table, part, compression="zstd")
    made = read_points(file)
    assert made is not None
    _FILES.prune()
    return made


def evenly(count: int, most: int) -> Int64Array:
    """Choose at most `most` of `count` rows, evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def principal(vectors_NV: NDArray[np.float32]) -> NDArray[np.float32]:
    """Project on the two directions of most variance, (N, 2): some milliseconds for thousands."""
    if len(vectors_NV) < 2 or vectors_NV.shape[1] < 2:
        return np.concatenate([vectors_NV[:, :1], np.zeros((len(vectors_NV), 1), np.float32)], axis=1)
    from sklearn.decomposition import PCA

    plane_N2: NDArray[np.float32] = PCA(2, svd_solver="covariance_eigh").fit_transform(vectors_NV).astype(np.float32)
    return plane_N2


def read_points(file: Path) -> MapPoints | None:
    """Read a file of points; None if it is missing or damaged."""
    try:
        table = pq.read_table(file, columns=["key", "uri", "x", "y", "ctr", "impressions"])
        about = json.loads(table.schema.metadata[_ABOUT])
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException):
        file.unlink(missing_ok=True)
        return None
    numbers: dict[str, Any] = {name: table[name].to_numpy() for name in table.column_names if name != "uri"}
    return MapPoints(
        keys_N=numbers["key"],
        uris_N=[str(each) for each in table["uri"].to_pylist()],
        x_N=numbers["x"],
        y_N=numbers["y"],
        ctr_N=numbers["ctr"],
        impressions_N=numbers["impressions"],
        about=about,
        file=file,
    )


def _files_of(samples: str) -> list[Any]:
    """Return an identity of the test samples; it differs if a file was changed in place."""
    root = Path(samples)
    files = sorted(root.glob("test/*.parquet")) if root.is_dir() else []
    return [samples, *[(each.name, each.stat().st_size, each.stat().st_mtime_ns) for each in files]]


def _counts(places: Places, saved: "SavedRun", keys_N: Int64Array) -> tuple[Int64Array, Int64Array, list[str]]:
    """Count impressions and clicks of images as ads in the test samples, (N,); notes say what could not be counted."""
    from trainer.comm import SoloComm
    from trainer.runs.saved import open_test

    try:
        index = open_test(SoloComm(), saved.config, saved.schema, places.samples)
        keys_I, counts_I2, is_sampled = count_ads(index, saved.schema)
    except UserError as error:
        return np.zeros_like(keys_N), np.zeros_like(keys_N), [f"CTR cannot be shown: {one_line(error)}"]
    place_N = np.searchsorted(keys_I, keys_N)
    counts_N2 = np.append(counts_I2, [[0, 0]], axis=0)[place_N]
    counts_N2[np.append(keys_I, 0)[place_N] != keys_N] = 0
    notes = [f"CTRs are of about {MOST_IMPRESSIONS:,} of the test impressions."] if is_sampled else []
    return counts_N2[:, 0], counts_N2[:, 1], notes


def count_ads(index: "SampleIndex", schema: "Schema") -> tuple[Int64Array, Int64Array, bool]:
    """Count impressions and clicks, (I, 2), of each ad image, keys ascending (I,), and whether some were left out.

    Reads in pieces. Without ad images in the schema there are none. Raises DataError, SchemaError.
    """
    from trainer.evaluation.predict import ad_image_field
    from trainer.samples.columns import decode, rules_of, source_columns
    from trainer.samples.index import read_row_groups

    keys, counts = [np.empty(0, np.int64)], [np.empty((0, 2), np.int64)]
    every = max(1, -(-index.num_samples // MOST_IMPRESSIONS))
    if (image := ad_image_field(schema)) is not None:
        rules = {name: rule for name, rule in rules_of(schema).items() if name in (schema.label, image.column_name)}
        for row_group, table in read_row_groups(index.storage, index.row_groups[::every], list(source_columns(rules))):
            file = index.storage.full(row_group.file)
            columns = decode(table, rules, schema.label, file, row_group.first_row).columns
            keys_I, of_N = np.unique(columns[image.column_name].values, return_inverse=True)
            clicks_I = np.bincount(of_N, columns[schema.label].values, len(keys_I)).astype(np.int64)
            keys.append(keys_I)
            counts.append(np.stack([np.bincount(of_N, minlength=len(keys_I)), clicks_I], axis=1))
    keys_I, of_R = np.unique(np.concatenate(keys), return_inverse=True)
    sums_I2 = np.zeros((len(keys_I), 2), np.int64)
    np.add.at(sums_I2, of_R, np.concatenate(counts))
    return keys_I, sums_I2, every > 1


COLUMNS, ROWS = 12, 9
MOST_DRAWN = 3_000
"""Points that a browser draws one by one."""
_MOST_GROUPS = 9
OTHERS = "others"
Colour = Literal["folder", "ctr"]
COLOURS: dict[Colour, str] = {"folder": "folder of the image", "ctr": "CTR"}


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
    return bool(np.isfinite(points.ctr_N).any()) if colour == "ctr" else len(set(map(folder_of, points.uris_N))) > 1


def _scaled(values_N: NDArray[np.float32]) -> NDArray[np.float64]:
    """Scale values to 0 to 1, clipping one in a hundred at each end."""
    low, high = np.quantile(values_N, [0.01, 0.99])
    if high <= low:
        return np.full(len(values_N), 0.5)
    scaled_N: NDArray[np.float64] = np.clip((values_N - low) / float(high - low), 0, 1)
    return scaled_N
