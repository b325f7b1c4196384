"""What a map is made of: visual vectors of a run, or features of a store, of at most MOST_POINTS images.

Letters of shapes: N images that are drawn, V width of their vectors, D feature width.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from explorer.data.background import Task
from explorer.data.vectors import visual_vectors
from explorer.errors import ExplorerError
from explorer.places import Places
from featurestore.keys import Int64Array
from featurestore.snapshot import Snapshot, SnapshotId

if TYPE_CHECKING:
    from trainer.schema import Schema

MOST_POINTS = 20_000
_MOST_BYTES = 1 << 30
"""Features that are read at most; of a larger store, some shards. A shard has images at random, by a hash."""
_WIDTH = 128
"""Wider features are projected to this number of dimensions at random, which keeps distances to some 10 %."""


@dataclass(frozen=True, kw_only=True)
class MapVectors:
    """Vectors of the images that are drawn, and where samples and schema that speak of them are."""

    keys_N: Int64Array
    uris_N: Sequence[str]
    vectors_NV: NDArray[np.float32]
    digest: str
    run: str | None
    num_images: int
    """Of which the points are a sample."""
    about: dict[str, Any]
    samples: str | None
    test_days: Sequence[str] | None
    schema: "Callable[[], Schema]"
    networks: Sequence[str] = field(default=())
    """The networks E of the run, STORE:NAME, one of which made the vectors."""
    notes: Sequence[str] = field(default=())

    @property
    def count(self) -> int:
        """Images that are drawn."""
        return len(self.keys_N)


def of_run(places: Places, name: str, task: Task[Any], network: str | None = None) -> MapVectors:
    """Take the visual vectors of a run's newest checkpoint, every k-th image of the store.

    `network`: which E, STORE:NAME; None: the first one. Raises ExplorerError where the run has no such E, and as
    visual vectors do.
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
        schema=lambda: saved.schema,
        networks=networks,
    )


def of_features(places: Places, task: Task[Any]) -> MapVectors:
    """Take the features of the store's newest snapshot: every k-th image, of some shards where there are many bytes.

    Raises FeatureStoreError, ExplorerError for an empty store.
    """
    from featurestore.store import FeatureStore
    from trainer.schema import load_schema

    assert places.store is not None
    snapshot = FeatureStore.open(places.store).snapshot()
    if snapshot.num_rows == 0:
        raise ExplorerError(f"{places.store} has no images")
    keys, uris, features, notes = _drawn(snapshot, task)
    commit = [snapshot.info.store_id, snapshot.manifest.commit_id, snapshot.version]
    return MapVectors(
        keys_N=keys,
        uris_N=uris,
        vectors_NV=features,
        digest=hashlib.sha256(json.dumps(["features", *commit]).encode()).hexdigest()[:24],
        run=None,
        num_images=snapshot.num_rows,
        about={"of": f"features of snapshot {snapshot.version}", **SnapshotId.of(snapshot).named()},
        samples=None,
        test_days=None,
        schema=load_schema,
        notes=notes,
    )


def evenly(count: int) -> Int64Array:
    """Choose at most MOST_POINTS of `count` rows, evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, MOST_POINTS)).astype(np.int64))


def _drawn(snapshot: Snapshot, task: Task[Any]) -> tuple[Int64Array, list[str], NDArray[np.float32], list[str]]:
    """Read the images that are drawn, some megabytes at a time."""
    shards = sorted(snapshot.manifest.shards)
    every_shard = max(1, -(-snapshot.num_rows * snapshot.info.row_bytes // _MOST_BYTES))
    chosen, notes = shards[::every_shard], []
    if len(chosen) < len(shards):
        notes.append(f"Of {len(shards):,} shards {len(chosen):,} were read; each has images at random.")
    expected = snapshot.num_rows * len(chosen) / len(shards)
    every = max(1, -(-int(expected) // MOST_POINTS))
    narrow = _narrower(snapshot.info.dim)
    keys: list[Int64Array] = []
    uris: list[str] = []
    parts, seen = [], 0
    for batch in snapshot.arrow_batches(["key", "uri", "feature"], shards=chosen):
        row_K = np.arange(-seen % every, len(batch), every)
        seen += len(batch)
        task.tell("reads features", seen, int(expected))
        if len(row_K):
            some = batch.take(row_K)
            values: Any = some["feature"]
            keys.append(np.asarray(some["key"]))
            uris += map(str, some["uri"].to_pylist())
            parts.append(narrow(values.flatten().to_numpy().reshape(len(row_K), -1)))
    return np.concatenate(keys), uris, np.concatenate(parts).astype(np.float32), notes


def _narrower(width: int) -> "Callable[[NDArray[np.float32]], NDArray[np.float32]]":
    if width <= _WIDTH:
        return lambda features: features
    from sklearn.random_projection import GaussianRandomProjection

    projected = GaussianRandomProjection(_WIDTH, random_state=0).fit(np.zeros((1, width), np.float32))
    return lambda features: projected.transform(features).astype(np.float32)
