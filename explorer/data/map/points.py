"""Points of a map: which images, where they are, and what is known of them.

They are kept as Parquet, which embedding-atlas opens.

Letters of shapes: N points.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from explorer.data.background import Task
from explorer.data.map import ads, projection
from explorer.data.map.source import MapVectors
from explorer.data.predictions import predictions_of
from explorer.data.vectors import explorer_cache
from explorer.errors import ExplorerError
from explorer.places import Places
from featurestore.console.files import replaced_file
from featurestore.errors import UserError
from featurestore.keys import Int64Array
from featurestore.text import one_line

Method = Literal["pca", "umap"]
_PREFIX, _PLANE = "map-", "plane-"
_KEPT = 32
_ABOUT = b"explorer_map"
NO_CATEGORY = "unknown"


@dataclass(frozen=True, kw_only=True)
class MapPoints:
    """Images in the plane. NaN in `ctr_N` and `error_N` where there were no impressions, or no predictions."""

    keys_N: Int64Array
    uris_N: list[str]
    x_N: NDArray[np.float32]
    y_N: NDArray[np.float32]
    ctr_N: NDArray[np.float32]
    category_N: list[str]
    error_N: NDArray[np.float32]
    impressions_N: Int64Array
    about: dict[str, Any]
    """method, run, network and all networks of it, num_images (of which the points are a sample), the id of the store
    that has the images, and notes, sentences for the page."""
    file: Path
    """The Parquet file of them."""

    @property
    def method(self) -> Method:
        """How they were laid out."""
        method: Method = self.about["method"]
        return method


def make_points(places: Places, vectors: MapVectors, method: Method, task: Task[Any]) -> MapPoints:
    """Lay out images and join what is known of them, or read what was made before.

    Raises ExplorerError where UMAP fails; what else is lacking (samples, predictions) is said in the notes.
    """
    folder = explorer_cache()
    made_of = [vectors.digest, method, _identity(places, vectors), list(vectors.networks)]
    name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:24]
    file = folder / f"{_PREFIX}{name}.parquet"
    if (known := read_points(file)) is not None:
        return known
    _write(file, vectors, method, _plane(folder, vectors, method, task), places, task)
    found = read_points(file)
    assert found is not None
    for pattern in (f"{_PREFIX}*.parquet", f"{_PLANE}*.npy"):
        for old in sorted(folder.glob(pattern), key=lambda each: -each.stat().st_mtime)[_KEPT:]:
            old.unlink(missing_ok=True)
    return found


def has_plane(vectors: MapVectors, method: Method) -> bool:
    """Tell whether these images have been laid out so before."""
    return _plane_file(explorer_cache(), vectors, method).is_file()


def _plane_file(folder: Path, vectors: MapVectors, method: Method) -> Path:
    return folder / f"{_PLANE}{vectors.digest}-{method}.npy"


def _plane(folder: Path, vectors: MapVectors, method: Method, task: Task[Any]) -> NDArray[np.float32]:
    """Lay the images out, or read how they were before."""
    file = _plane_file(folder, vectors, method)
    with contextlib.suppress(OSError, ValueError):
        known: NDArray[np.float32] = np.load(file)
        if known.shape == (vectors.count, 2):
            return known
    if method == "umap":
        plane_N2 = projection.umap_in_process(vectors.vectors_NV, task.tell)
    else:
        task.tell("lays out the images")
        plane_N2 = projection.principal(vectors.vectors_NV)
    with replaced_file(file) as part:
        np.save(part, plane_N2)
    return plane_N2


def read_points(file: Path) -> MapPoints | None:
    """Read a file of points; None where there is none, or it is damaged."""
    try:
        table = pq.read_table(file)
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
    """Name what the columns of the ads depend on; a file that changed in its place gets another map."""
    place = places.samples or vectors.samples
    root = Path(place or "")
    files = sorted(root.glob("test/*.parquet")) if place and root.is_dir() else []
    return [place, *[(each.name, each.stat().st_size, each.stat().st_mtime_ns) for each in files]]


def _write(
    file: Path, vectors: MapVectors, method: Method, plane_N2: NDArray[np.float32], places: Places, task: Task[Any]
) -> None:
    count, notes = len(vectors.keys_N), list(vectors.notes)
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
            notes.append(f"CTRs are of about {ads.MOST_IMPRESSIONS:,} of the test impressions.")
    run = vectors.run
    if run is not None:
        losses = _noted(notes, "The error", lambda: ads.mean_loss(predictions_of(places, run, task)))
        if losses is not None and len(losses[0]):
            keys_I, loss_I = losses
            at_N = np.minimum(np.searchsorted(keys_I, vectors.keys_N), len(keys_I) - 1)
            is_in_N = keys_I[at_N] == vectors.keys_N
            error_N[is_in_N] = loss_I[at_N[is_in_N]]
    about = {**vectors.about, "method": method, "run": run, "num_images": vectors.num_images, "notes": notes}
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
    }
    table = pa.table(columns).replace_schema_metadata({_ABOUT: json.dumps(about)})
    with replaced_file(file) as part:
        pq.write_table(table, part, compression="zstd")


def _ads(places: Places, vectors: MapVectors) -> ads.AdImages | None:
    from trainer.comm import SoloComm
    from trainer.samples.reader import open_index

    samples = places.samples or vectors.samples
    if samples is None:
        raise ExplorerError("no --samples were given")
    days = None if places.samples else vectors.test_days
    return ads.read_ads(open_index(SoloComm(), samples, "test", vectors.schema(), days), vectors.schema())


def _noted(notes: list[str], what: str, compute: Callable[[], Any]) -> Any:
    """Compute what a map can do without; note why it is not there."""
    try:
        return compute()
    except UserError as error:
        notes.append(f"{what} cannot be shown: {one_line(error)}")
        return None
