"""Visual vectors of a store's images by checkpoints of runs, cached on disk, and features of uploaded pictures.

The cache has one file for each checkpoint and snapshot, which is mapped into memory: a million images of 12 numbers
are some 120 MB, of which only the pages that are read are in memory. The cache may be deleted at any time.

A picture goes through the network that made a store's features. Nothing is downloaded and nothing of the picture is
written to the disk.

Letters of shapes: N images, K of them in a block, D feature width, V visual width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from explorer.data.background import Background, Task
from explorer.data.cache import TableCache, about_of, described, digest_of
from explorer.data.runs.folders import trained_runs
from explorer.data.snapshots import name_of
from explorer.errors import ExplorerError
from explorer.places import Places
from explorer.problems import Problem
from featurestore.errors import UserError
from featurestore.format.datafile import KEY
from featurestore.keys import Int64Array
from featurestore.published.paths import RunPath
from featurestore.spec import StoreInfo
from featurestore.store import FeatureStore, Snapshot
from trainer.runs.folder import finished

if TYPE_CHECKING:
    from pipeline.network.backbone import Backbone

Progress = Callable[[int, int], None]
"""Receives the number done, and the total."""
VECTOR = "vector"
MOST_RUNS = 100
MOST_BYTES = 10_000_000
"""Most bytes of an uploaded picture."""
_FILES = TableCache("vectors-", most=16)
"""One for each of the checkpoints and snapshots used last."""


@dataclass(frozen=True)
class VisualVectors:
    """Visual vectors of all images of a snapshot, mapped from a file."""

    table: pa.Table
    """Key, uri and vector, (N,)."""

    @property
    def about(self) -> dict[str, Any]:
        """Run, checkpoint and its digest, network, width, store, snapshot and their ids."""
        found: dict[str, Any] = about_of(self.table)
        return found

    def blocks(self) -> Iterator[tuple[Int64Array, npt.NDArray[np.float32]]]:
        """Yield keys (K,) and vectors (K, V), some thousands at a time."""
        for batch in self.table.to_batches():
            block = pa.Table.from_batches([batch])
            yield block[KEY].to_numpy(), vectors_in(block)

    def of(self, key: int) -> npt.NDArray[np.float32] | None:
        """Return the vector of an image, (V,), or None. Reads the keys, 8 MB for a million."""
        return next((vectors_KV[keys_K == key][0] for keys_K, vectors_KV in self.blocks() if key in keys_K), None)


def vectors_in(table: pa.Table) -> npt.NDArray[np.float32]:
    """Return the vectors of a table's images, (N, V)."""
    vectors: Any = table[VECTOR].combine_chunks()
    found: npt.NDArray[np.float32] = vectors.flatten().to_numpy().reshape(-1, vectors.type.list_size)
    return found


def visual_vectors(
    run: RunPath,
    *,
    store: str | None = None,
    store_version: int | None = None,
    progress: Progress = lambda done, total: None,
) -> VisualVectors:
    """Compute the visual vectors of all images, or open the cached ones; `progress` counts images.

    By the newest checkpoint. `store`: current address of the run's store; `store_version`: by default the newest.
    Cost: about 10 s for 100,000 images on a core, or some milliseconds from the cache. Raises TrainerError (a run
    without images or without a checkpoint), FeatureStoreError.
    """
    from trainer.runs.saved import open_network

    found = open_network(run, store_version=store_version, store=store)

    def computed() -> Iterator[pa.Table]:
        schema, done = described(found.schema(), found.describe()), 0
        for table in found.tables():
            done += len(table)
            yield table.cast(schema)
            progress(done, found.snapshot.num_rows)

    commit = found.snapshot.info.store_id, found.snapshot.manifest.commit_id, found.snapshot.version
    return VisualVectors(_FILES.get(digest_of([found.saved.digest, found.store, *commit]), computed))


def image_runs(places: Places) -> list[str]:
    """List the runs and days of trainer.daily whose model uses images, at most MOST_RUNS, in the order of the pages.

    Reads a few small files of a new one.
    """
    return [run.name for run in trained_runs(places) if run.images != "none"][:MOST_RUNS]


def begin_vectors(places: Places, name: str, snapshot: Snapshot, background: Background) -> Task[VisualVectors]:
    """Start `visual_vectors` of a run in the background, one run at a time, unless it was started before.

    The task reports its progress. Its result is kept until the run has a newer checkpoint.
    """
    run = places.run(name)

    def work(task: Task[VisualVectors]) -> VisualVectors:
        task.tell(f"opens the run {name}")
        return visual_vectors(
            run,
            store=places.store,
            store_version=snapshot.version,
            progress=lambda done, total: task.tell(f"computes the visual vectors of {name}", done, total),
        )

    checkpoints = [each.identity for each in finished(run)[-1:]]
    return background.task(repr(("vectors", name, checkpoints, name_of(snapshot))), work, alone=True)


def embed(places: Places, run: str, snapshot: Snapshot, features_ND: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Compute visual vectors (N, V) of features (N, D) as the store keeps them, by the E of a run's newest checkpoint.

    Raises TrainerError if E is for other features, FeatureStoreError.
    """
    import torch

    from featurestore.lookup.ondevice import as_tensor
    from trainer.runs.saved import open_network

    model = open_network(places.run(run), store_version=snapshot.version, store=places.store).model
    with torch.inference_mode():
        device = model.mean_D.device
        visual_NV: npt.NDArray[np.float32] = model(as_tensor(features_ND).to(device)).float().cpu().numpy()
    return visual_NV


def why_not(info: StoreInfo) -> ExplorerError | None:
    """Return the error that says why the store's network cannot be built here, if so. Reads no weights."""
    if info.network is None:
        return ExplorerError(Problem.UNKNOWN_NETWORK)
    backbone, weights = info.network.backbone, info.network.weights
    if weights.startswith("random:"):
        return None
    if weights.startswith("imagenet"):
        is_here = _downloaded_weights(backbone, weights)
        return None if is_here else ExplorerError(Problem.NOT_DOWNLOADED, weights, backbone)
    return None if Path(weights).is_file() else ExplorerError(Problem.NO_WEIGHTS, weights)


def feature_of_picture(store: FeatureStore, data: bytes) -> npt.NDArray[Any]:
    """Compute the feature of a picture by the store's own network, (1, K) as the store keeps it.

    Raises ExplorerError if the network cannot be built here or differs, BadImageError if it is not a picture.
    """
    from pipeline.images.decode import prepare

    if (reason := why_not(store.info)) is not None:
        raise reason
    network = _network(store.info)
    pixels = prepare(data, network.preset)
    feature_1D = network.features(np.array(pixels.pixels_HWC)[None])
    return store.codec.encode(store.project(feature_1D))


def _network(info: StoreInfo) -> "Backbone":
    from pipeline.network.backbone import backbone

    assert info.network is not None
    try:
        network = backbone(info.network.backbone, info.network.weights, info.extractor.precision)
    except UserError as error:
        raise ExplorerError(Problem.UNBUILDABLE_NETWORK, error) from error
    if network.spec != info.extractor:
        mine, theirs = network.spec.model_dump(), info.extractor.model_dump()
        differing = ", ".join(name for name in mine if mine[name] != theirs[name])
        raise ExplorerError(Problem.OTHER_NETWORK, info.network.backbone, info.network.weights, differing)
    return network


def _downloaded_weights(backbone: str, weights: str) -> bool:
    import torch

    from pipeline.network.backbone import network_of

    try:
        url = network_of(backbone, weights).weights_entry.url
    except UserError:
        return False
    return bool((Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]).is_file())
