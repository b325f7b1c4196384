"""Visual vectors of a store's images by checkpoints of runs, cached on disk, and features of uploaded pictures.

The cache has one folder for each checkpoint and snapshot, which is mapped into memory: a million images of 12 numbers
are a file of 48 MB, of which only the pages that are read are in memory. The cache may be deleted at any time.

A picture goes through the network that made a store's features. Nothing is downloaded and nothing of the picture is
written to the disk.

Letters of shapes: N images, K of them in a block, D feature width, V visual width.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from explorer.data.background import Background, Task
from explorer.data.cache import FileCache, LruCache
from explorer.data.runs.folders import trained_runs
from explorer.data.snapshots import name_of
from explorer.errors import ExplorerError
from explorer.places import Places
from featurestore.errors import UserError
from featurestore.keys import Int64Array
from featurestore.published.paths import RunPath
from featurestore.snapshot import Snapshot
from featurestore.spec import StoreInfo
from featurestore.store import FeatureStore
from trainer.runs.folder import finished

if TYPE_CHECKING:
    from pipeline.network.backbone import Backbone
    from trainer.runs.export import ImageNetwork

Progress = Callable[[int, int], None]
"""Receives the number done, and the total."""
MOST_RUNS = 100
MOST_BYTES = 10_000_000
"""Most bytes of an uploaded picture."""
_BLOCK_ROWS = 1 << 16
_VECTORS, _KEYS, _URIS, _ABOUT = "vectors.npy", "keys.npy", "uris.arrow", "about.json"
_LOCK = Lock()
_FOLDERS = FileCache("vectors-", "", most=16)
"""One for each of the checkpoints used last."""


@dataclass(frozen=True)
class VisualVectors:
    """Visual vectors of all images of a snapshot, mapped from files; row n of all three is the same image."""

    keys_N: Int64Array
    vectors_NV: npt.NDArray[np.float32]
    uris_N: Any
    """A chunked array of texts."""
    about: dict[str, Any]
    """Run, checkpoint and its digest, network, width, store, snapshot and their ids."""
    digest: str
    """Digest of checkpoint, network and snapshot, which identifies the vectors."""


def visual_vectors(
    run: RunPath,
    *,
    store: str | None = None,
    network: str | None = None,
    store_version: int | None = None,
    progress: Progress = lambda done, total: None,
) -> VisualVectors:
    """Compute the visual vectors of all images, or open the cached ones; `progress` counts images.

    By the newest checkpoint. `store`: current address of the run's store; `network`: which E, if a run has several;
    `store_version`: by default the newest. Cost: about 10 s for 100,000 images on a core, or some milliseconds from the
    cache. Raises TrainerError (a run without images or without a checkpoint), FeatureStoreError.
    """
    from trainer.runs.export import open_network

    found = open_network(run, network=network, store_version=store_version, store=store)
    digest = digest_of(found)
    place = _FOLDERS.path(digest)
    with _LOCK:
        if (opened := _opened(place, digest)) is None:
            _compute(found, place, progress)
            opened = _opened(place, digest)
            assert opened is not None
            _FOLDERS.prune()
    return opened


def digest_of(found: "ImageNetwork") -> str:
    """Return a digest of the inputs of vectors: the checkpoint, the network and the commit of the snapshot."""
    commit = found.snapshot.info.store_id, found.snapshot.manifest.commit_id, found.snapshot.version
    values = json.dumps([found.saved.digest, found.store, found.name, *commit])
    return hashlib.sha256(values.encode()).hexdigest()[:24]


def _opened(place: Path, digest: str) -> VisualVectors | None:
    if not place.is_dir():
        return None
    with contextlib.suppress(OSError):
        os.utime(place)
    uris = pa.ipc.open_file(pa.memory_map(str(place / _URIS))).read_all().column(0)
    return VisualVectors(
        keys_N=np.load(place / _KEYS, mmap_mode="r"),
        vectors_NV=np.load(place / _VECTORS, mmap_mode="r"),
        uris_N=uris,
        about=json.loads((place / _ABOUT).read_bytes()),
        digest=digest,
    )


def _compute(network: "ImageNetwork", place: Path, progress: Progress) -> None:
    """Write the vectors into a folder that is renamed when it is complete."""
    from featurestore.format.datafile import KEY, URI
    from trainer.runs.export import VECTOR

    rows, width = network.num_images, network.width
    part = Path(tempfile.mkdtemp(prefix=".tmp-", dir=place.parent))
    try:
        keys_N = np.lib.format.open_memmap(part / _KEYS, "w+", np.int64, (rows,))
        vectors_NV = np.lib.format.open_memmap(part / _VECTORS, "w+", np.float32, (rows, width))
        schema, done = pa.schema([pa.field(URI, pa.large_string())]), 0
        with pa.OSFile(str(part / _URIS), "wb") as file, pa.ipc.new_file(file, schema) as uris:
            for table in network.tables():
                end = done + len(table)
                keys_N[done:end] = table[KEY].to_numpy()
                numbers: Any = table[VECTOR].combine_chunks()
                vectors_NV[done:end] = numbers.flatten().to_numpy().reshape(-1, width)
                uris.write_table(table.select([URI]).cast(schema))
                done = end
                progress(done, rows)
        assert done == rows
        keys_N.flush()
        vectors_NV.flush()
        (part / _ABOUT).write_text(json.dumps(network.describe()))
        with contextlib.suppress(OSError):  # another process has computed the same
            part.rename(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


class ImageRuns:
    """The runs with a checkpoint whose model uses images, and their vectors. Thread-safe."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._vectors: LruCache[VisualVectors] = LruCache(8)

    def names(self) -> list[str]:
        """List the names of the runs and days of trainer.daily, at most MOST_RUNS, in the order of the pages.

        Reads a few small files of a new one.
        """
        seeing = [run.name for run in trained_runs(self._places) if run.images != "none"]
        return seeing[:MOST_RUNS]

    def begin(self, name: str, snapshot: Snapshot, background: Background) -> Task[VisualVectors]:
        """Start `vectors` in the background, one run at a time, unless it was started before.

        The task reports its progress. Raises like `vectors` if there is no such run.
        """
        mark = self._mark(name, snapshot)

        def work(task: Task[VisualVectors]) -> VisualVectors:
            doing = f"computes the visual vectors of {name}"
            task.tell(f"opens the run {name}")
            return self.vectors(name, snapshot, lambda done, total: task.tell(doing, done, total))

        return background.task(repr(("vectors", mark)), work, alone=True)

    def vectors(self, name: str, snapshot: Snapshot, progress: Progress = lambda done, total: None) -> VisualVectors:
        """Open the vectors of all images of a snapshot by a run's newest checkpoint, or compute them the first time.

        The newest checkpoint is looked up each time; the rest of the run is read once per checkpoint.

        Raises ExplorerError, TrainerError, FeatureStoreError.
        """
        run, store = self._places.run(name), self._places.store
        return self._vectors.get(
            self._mark(name, snapshot),
            lambda: visual_vectors(run, store=store, store_version=snapshot.version, progress=progress),
        )

    def _mark(self, name: str, snapshot: Snapshot) -> Hashable:
        """Return a text of everything that the vectors depend on."""
        return name, _newest_checkpoint(self._places.run(name)), name_of(snapshot)


def _newest_checkpoint(run: RunPath) -> str | None:
    """Tell the newest checkpoint from any other, also of a run of the same name."""
    found = finished(run)
    return found[-1].identity if found else None


def blocks_of(vectors: VisualVectors) -> Iterator[tuple[Int64Array, npt.NDArray[np.float32]]]:
    """Yield keys (K,) and vectors (K, V), some megabytes at a time."""
    for start in range(0, len(vectors.keys_N), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        yield np.asarray(vectors.keys_N[block]), np.asarray(vectors.vectors_NV[block])


def vector_of(vectors: VisualVectors, key: int) -> npt.NDArray[np.float32] | None:
    """Return the vector of an image, (V,), or None. Reads the keys, 8 MB for a million."""
    rows = np.flatnonzero(vectors.keys_N == key)
    return np.array(vectors.vectors_NV[rows[0]]) if len(rows) else None


def embed(places: Places, run: str, snapshot: Snapshot, features_ND: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Compute visual vectors (N, V) of features (N, D) as the store keeps them, by the E of a run's newest checkpoint.

    Raises TrainerError if E is for other features, FeatureStoreError.
    """
    import torch

    from featurestore.lookup.ondevice import as_tensor
    from trainer.runs.export import open_network

    model = open_network(places.run(run), store_version=snapshot.version, store=places.store).model
    with torch.inference_mode():
        device = model.mean_D.device
        visual_NV: npt.NDArray[np.float32] = model(as_tensor(features_ND).to(device)).float().cpu().numpy()
    return visual_NV


def why_not(info: StoreInfo) -> str:
    """Explain in a sentence why the store's network cannot be built here, or return "". Reads no weights."""
    if info.network is None:
        return "The store does not say which network made its features: they were imported."
    weights = info.network.weights
    if weights.startswith("random:"):
        return ""
    if weights.startswith("imagenet"):
        found = _downloaded_weights(info.network.backbone, weights)
        missing = f"The weights {weights} of {info.network.backbone} are not in this machine's cache of torch"
        return "" if found else f"{missing}; nothing is downloaded here."
    return "" if Path(weights).is_file() else f"The weights {weights} are not on this machine."


def feature_of_picture(store: FeatureStore, data: bytes) -> npt.NDArray[Any]:
    """Compute the feature of a picture by the store's own network, (1, K) as the store keeps it.

    Raises ExplorerError if the network cannot be built here or differs, BadImageError if it is not a picture.
    """
    from pipeline.images.decode import prepare

    if problem := why_not(store.info):
        raise ExplorerError(problem)
    network = _network(store.info)
    pixels = prepare(data, network.preset)
    feature_1D = network.features(np.array(pixels.pixels_HWC)[None])
    return store.codec.encode(store.project(feature_1D))


def _network(info: StoreInfo) -> "Backbone":
    from pipeline.network.backbone import backbone

    assert info.network is not None
    compute_dtype: Any = info.extractor.compute_dtype
    try:
        network = backbone(info.network.backbone, info.network.weights, compute_dtype)
    except UserError as error:
        raise ExplorerError(f"The store's network cannot be built on this machine: {error}") from error
    if network.spec != info.extractor:
        mine, theirs = network.spec.model_dump(), info.extractor.model_dump()
        differing = ", ".join(name for name in mine if mine[name] != theirs[name])
        raise ExplorerError(
            f"The network {info.network.backbone} with weights {info.network.weights} differs on this machine "
            f"from when the store was made: {differing} differ"
        )
    return network


def _downloaded_weights(backbone: str, weights: str) -> bool:
    import torch

    from pipeline.network.layers import network_of

    try:
        url = network_of(backbone, weights).weights_entry.url
    except UserError:
        return False
    return bool((Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]).is_file())
