"""A map: images as points of a plane, close together if their vectors are, with their statistics as ads.

Points are stored as Parquet with their vectors, which embedding-atlas opens and lays out by UMAP.

Letters of shapes: N images that are drawn, which are the points, and the impressions of `mean_loss`; V width of their
vectors, D feature width, I different ad images.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from explorer.data.background import Task
from explorer.data.cache import FileCache
from explorer.data.predictions import predictions_of
from explorer.data.vectors import visual_vectors
from explorer.errors import ExplorerError
from explorer.places import Places
from featurestore.console.files import replaced_file
from featurestore.errors import UserError
from featurestore.keys import Int64Array
from featurestore.text import one_line

if TYPE_CHECKING:
    from trainer.evaluation.predict import Predictions
    from trainer.samples.index import RowGroup, SampleIndex
    from trainer.schema import Field, Schema


MOST_POINTS = 20_000


@dataclass(frozen=True, kw_only=True)
class MapVectors:
    """Vectors of the drawn images, and the addresses of their samples and schema."""

    keys_N: Int64Array
    uris_N: Sequence[str]
    vectors_NV: NDArray[np.float32]
    digest: str
    run: str
    num_images: int
    """Number of images; the points are a sample of them."""
    about: dict[str, Any]
    samples: str
    test_days: Sequence[str] | None
    schema: "Schema"
    networks: Sequence[str]
    """The networks E of the run, STORE:NAME, one of which made the vectors."""

    @property
    def count(self) -> int:
        """Number of drawn images."""
        return len(self.keys_N)


def of_run(places: Places, name: str, task: Task[Any], network: str | None = None) -> MapVectors:
    """Take the visual vectors of a run's newest checkpoint, every k-th image of the store.

    `network`: which E, STORE:NAME; None: the first one. Raises ExplorerError if the run has no such E, and the errors
    of visual vectors.
    """
    from trainer.runs.export import network_widths
    from trainer.runs.saved import read_run

    task.tell(f"computes the visual vectors of {name}")
    saved = read_run(places.run(name), None, places.samples)
    networks = [":".join(each) for each in network_widths(saved)]
    if not networks:
        raise ExplorerError(
            f"the run {name} has model.images=none: it has no E for images, so no map; choose another run"
        )
    if network is not None and network not in networks:
        raise ExplorerError(f"the run {name} has no content {network[:80]!r}; it has {', '.join(networks)}")
    found = visual_vectors(
        places.run(name),
        store=places.store,
        network=network or networks[0],
        progress=lambda done, total: task.tell(f"computes the visual vectors of {name}", done, total),
    )
    row_N = evenly(len(found.keys_N))
    return MapVectors(
        keys_N=found.keys_N[row_N],
        uris_N=[str(each) for each in found.uris_N.take(row_N).to_pylist()],
        vectors_NV=found.vectors_NV[row_N],
        digest=found.digest,
        run=name,
        num_images=len(found.keys_N),
        about={**found.about, "of": f"visual vectors of {found.about['checkpoint']}"},
        samples=saved.config.data.samples,
        test_days=saved.config.data.test_days,
        schema=saved.schema,
        networks=networks,
    )


def evenly(count: int) -> Int64Array:
    """Choose at most MOST_POINTS of `count` rows, evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, MOST_POINTS)).astype(np.int64))


MOST_IMPRESSIONS = 2_000_000
"""Most impressions to read; of more, row groups are left out evenly."""
_CATEGORY = "category"


@dataclass(frozen=True)
class AdImages:
    """Ad images of the test samples, keys ascending."""

    keys_I: Int64Array
    impressions_I: Int64Array
    clicks_I: Int64Array
    category_I: Sequence[str | None]
    """Category as in the samples, or None."""
    is_sampled: bool
    """Whether impressions were left out."""

    def at(self, keys: Int64Array) -> Int64Array:
        """Find the position of each key, or -1 if it is not an ad's."""
        if len(self.keys_I) == 0:
            return np.full(len(keys), -1)
        places = np.minimum(np.searchsorted(self.keys_I, keys), len(self.keys_I) - 1)
        return np.where(self.keys_I[places] == keys, places, -1)


def read_ads(index: "SampleIndex", schema: "Schema") -> AdImages | None:
    """Count the impressions of each ad image, reading in pieces; None if the schema has no ad images.

    Raises DataError, SchemaError.
    """
    from trainer.evaluation.slices import ad_image_field

    image, category = ad_image_field(schema), category_field(schema)
    if image is None:
        return None
    chosen = _evenly(index.row_groups, index.num_samples)
    keys: list[Int64Array] = []
    counts: list[NDArray[np.int64]] = []
    categories: dict[int, str] = {}
    for keys_N, label_N, category_N in _columns(index, chosen, schema, image, category):
        keys_I, first_I, of_N = np.unique(keys_N, return_index=True, return_inverse=True)
        clicks_I = np.bincount(of_N, label_N, len(keys_I)).astype(np.int64)
        keys.append(keys_I)
        counts.append(np.stack([np.bincount(of_N, minlength=len(keys_I)), clicks_I], axis=1))
        if category_N is not None:
            categories |= dict(zip(keys_I.tolist(), category_N[first_I].tolist(), strict=True))
    keys_I, of_R = np.unique(np.concatenate([np.empty(0, np.int64), *keys]), return_inverse=True)
    sums_I2 = np.zeros((len(keys_I), 2), np.int64)
    if counts:
        np.add.at(sums_I2, of_R, np.concatenate(counts))
    return AdImages(
        keys_I=keys_I,
        impressions_I=sums_I2[:, 0],
        clicks_I=sums_I2[:, 1],
        category_I=[categories.get(key) for key in keys_I.tolist()],
        is_sampled=len(chosen) < len(index.row_groups),
    )


def category_field(schema: "Schema") -> "Field | None":
    """Find the field of the ad's category by its name: an ID field of side ad, or None."""
    of_ads = [field for field in schema.of_kind("id", side="ad") if not field.columns and not field.is_bucketed]
    return next((field for field in of_ads if _CATEGORY in field.name.lower()), None)


def mean_loss(predictions: "Predictions") -> tuple[Int64Array, NDArray[np.float64]]:
    """Compute the mean log loss of a run's predictions for each ad image: keys ascending (I,), losses (I,)."""
    image_N = predictions.impressions.image_N
    if image_N is None:
        return np.empty(0, np.int64), np.empty(0)
    label_N, logit_N = predictions.impressions.label_N.astype(np.float64), predictions.logit_N
    loss_N = np.logaddexp(0, logit_N) - logit_N * label_N
    keys_I, of_N = np.unique(image_N, return_inverse=True)
    return keys_I, np.bincount(of_N, loss_N, len(keys_I)) / np.bincount(of_N, minlength=len(keys_I))


def _evenly(row_groups: "Sequence[RowGroup]", num_samples: int) -> "Sequence[RowGroup]":
    every = -(-num_samples // MOST_IMPRESSIONS)
    return row_groups[::every] if every > 1 else row_groups


def _columns(
    index: "SampleIndex", row_groups: "Sequence[RowGroup]", schema: "Schema", image: "Field", category: "Field | None"
) -> Iterator[tuple[Int64Array, NDArray[np.float64], NDArray[Any] | None]]:
    """Read key, label and category of impressions, a row group at a time."""
    from trainer.samples.columns import decode, rules_of, source_columns, texts_of
    from trainer.samples.index import read_row_groups

    names = {schema.label, image.column_name} | ({category.column_name} if category else set())
    rules = {name: rule for name, rule in rules_of(schema).items() if name in names}
    for row_group, table in read_row_groups(index.storage, row_groups, list(source_columns(rules))):
        file = index.storage.full(row_group.file)
        groups = decode(table, rules, schema.label, file, row_group.first_row)
        category_N: NDArray[Any] | None = None
        if category is not None:
            column = category.column_name
            if column in index.text_columns:
                encoded = texts_of(table, column, rules[column], file, row_group.first_row)
                category_N = np.asarray(encoded.texts_U, object)[encoded.index_N]
            else:
                category_N = groups.columns[column].values.astype(str).astype(object)
        keys_N = groups.columns[image.column_name].values
        yield keys_N, groups.columns[schema.label].values.astype(np.float64), category_N


_FILES = FileCache("map-", ".parquet", most=32)
_ABOUT = b"explorer_map"
NO_CATEGORY = "unknown"
_COLUMNS = ["key", "uri", "x", "y", "ctr", "category", "error", "impressions"]
"""Those that the page shows."""


@dataclass(frozen=True, kw_only=True)
class MapPoints:
    """Images in the plane. `ctr_N` and `error_N` are NaN without impressions or predictions."""

    keys_N: Int64Array
    uris_N: list[str]
    x_N: NDArray[np.float32]
    y_N: NDArray[np.float32]
    ctr_N: NDArray[np.float32]
    category_N: list[str]
    error_N: NDArray[np.float32]
    impressions_N: Int64Array
    about: dict[str, Any]
    """run, network and all networks of it, num_images (of which the points are a sample), the id of the store that has
    the images, and notes, sentences for the page."""
    file: Path
    """The Parquet file of the points."""


def principal(vectors_NV: NDArray[np.float32]) -> NDArray[np.float32]:
    """Project on the two directions of most variance, (N, 2): some milliseconds for thousands."""
    if len(vectors_NV) < 2 or vectors_NV.shape[1] < 2:
        return np.concatenate([vectors_NV[:, :1], np.zeros((len(vectors_NV), 1), np.float32)], axis=1)
    from sklearn.decomposition import PCA

    plane_N2: NDArray[np.float32] = PCA(2, svd_solver="covariance_eigh").fit_transform(vectors_NV).astype(np.float32)
    return plane_N2


def make_map(places: Places, run: str, task: Task[Any], network: str | None = None) -> MapPoints:
    """Lay out the visual vectors of a run, and join the statistics; or read the cached points.

    `network`: which E of a run that has several, by default the first. Missing samples or predictions are mentioned in
    the notes. Raises the errors of its parts.
    """
    vectors = of_run(places, run, task, network)
    made_of = [vectors.digest, _identity(places, vectors), list(vectors.networks)]
    file = _FILES.path(hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:24])
    if (known := read_points(file)) is not None:
        return known
    _write(file, vectors, places, task)
    found = read_points(file)
    assert found is not None
    _FILES.prune()
    return found


def read_points(file: Path) -> MapPoints | None:
    """Read a file of points; None if it is missing or damaged."""
    try:
        table = pq.read_table(file, columns=_COLUMNS)
        about = json.loads(table.schema.metadata[_ABOUT])
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException):
        file.unlink(missing_ok=True)
        return None

    def numbers(name: str) -> Any:
        return table[name].to_numpy()

    def texts(name: str) -> list[str]:
        return [str(each) for each in table[name].to_pylist()]

    return MapPoints(
        keys_N=numbers("key"),
        uris_N=texts("uri"),
        x_N=numbers("x"),
        y_N=numbers("y"),
        ctr_N=numbers("ctr"),
        category_N=texts("category"),
        error_N=numbers("error"),
        impressions_N=numbers("impressions"),
        about=about,
        file=file,
    )


def _identity(places: Places, vectors: MapVectors) -> list[Any]:
    """Return an identity of the samples behind the columns of the ads; it differs if a file was changed in place."""
    place = places.samples or vectors.samples
    root = Path(place)
    files = sorted(root.glob("test/*.parquet")) if root.is_dir() else []
    return [place, *[(each.name, each.stat().st_size, each.stat().st_mtime_ns) for each in files]]


def _write(file: Path, vectors: MapVectors, places: Places, task: Task[Any]) -> None:
    task.tell("lays out the images")
    plane_N2 = principal(vectors.vectors_NV)
    count, notes = len(vectors.keys_N), list[str]()
    impressions_N, ctr_N, error_N = np.zeros(count, np.int64), np.full(count, np.nan), np.full(count, np.nan)
    category_N = [NO_CATEGORY] * count
    task.tell("reads the test samples")
    found = _noted(notes, "CTR and category", lambda: _ads(places, vectors))
    if found is not None:
        at_N = found.at(vectors.keys_N)
        is_ad_N = at_N >= 0
        impressions_N[is_ad_N] = found.impressions_I[at_N[is_ad_N]]
        ctr_N[is_ad_N] = found.clicks_I[at_N[is_ad_N]] / found.impressions_I[at_N[is_ad_N]]
        category_N = [found.category_I[at] or NO_CATEGORY if at >= 0 else NO_CATEGORY for at in at_N.tolist()]
        if found.is_sampled:
            notes.append(f"CTRs are of about {MOST_IMPRESSIONS:,} of the test impressions.")
    losses = _noted(notes, "The error", lambda: mean_loss(predictions_of(places, vectors.run, task)))
    if losses is not None and len(losses[0]):
        keys_I, loss_I = losses
        at_N = np.minimum(np.searchsorted(keys_I, vectors.keys_N), len(keys_I) - 1)
        is_in_N = keys_I[at_N] == vectors.keys_N
        error_N[is_in_N] = loss_I[at_N[is_in_N]]
    about = {**vectors.about, "run": vectors.run, "num_images": vectors.num_images, "notes": notes}
    about["networks"] = list(vectors.networks)
    columns: dict[str, Any] = {
        "key": pa.array(vectors.keys_N),
        "uri": pa.array(vectors.uris_N, pa.string()),
        "x": pa.array(plane_N2[:, 0].astype(np.float32)),
        "y": pa.array(plane_N2[:, 1].astype(np.float32)),
        "ctr": pa.array(ctr_N.astype(np.float32)),
        "category": pa.array(category_N, pa.string()),
        "error": pa.array(error_N.astype(np.float32)),
        "impressions": pa.array(impressions_N),
        "vector": pa.FixedSizeListArray.from_arrays(
            pa.array(vectors.vectors_NV.reshape(-1)), vectors.vectors_NV.shape[1]
        ),
    }
    table = pa.table(columns).replace_schema_metadata({_ABOUT: json.dumps(about)})
    with replaced_file(file) as part:
        pq.write_table(table, part, compression="zstd")


def _ads(places: Places, vectors: MapVectors) -> AdImages | None:
    from trainer.comm import SoloComm
    from trainer.samples.index import open_index

    days = None if places.samples else vectors.test_days
    index = open_index(SoloComm(), places.samples or vectors.samples, "test", vectors.schema, days)
    return read_ads(index, vectors.schema)


def _noted(notes: list[str], what: str, compute: Callable[[], Any]) -> Any:
    """Compute an optional part of a map, or add a note on why it is missing."""
    try:
        return compute()
    except UserError as error:
        notes.append(f"{what} cannot be shown: {one_line(error)}")
        return None


COLUMNS, ROWS = 12, 9
MOST_DRAWN = 3_000
"""Points that a browser draws one by one."""
_MOST_GROUPS = 9
OTHERS = "others"
Colour = Literal["folder", "category", "ctr", "error"]
COLOURS: dict[Colour, str] = {
    "folder": "folder of the image",
    "category": "category of the ad",
    "ctr": "CTR",
    "error": "error (log loss)",
}


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
    count = len(points.keys_N)
    return np.unique(np.linspace(0, count - 1, min(count, MOST_DRAWN)).astype(np.int64))


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
    values = {"ctr": points.ctr_N, "error": points.error_N}
    if colour in values:
        return bool(np.isfinite(values[colour]).any())
    names = points.category_N if colour == "category" else list(map(folder_of, points.uris_N))
    return len(set(names)) > 1


def _scaled(values_N: NDArray[np.float32]) -> NDArray[np.float64]:
    """Scale values to 0 to 1, clipping one in a hundred at each end."""
    low, high = np.quantile(values_N, [0.01, 0.99])
    if high <= low:
        return np.full(len(values_N), 0.5)
    scaled_N: NDArray[np.float64] = np.clip((values_N - low) / float(high - low), 0, 1)
    return scaled_N
