"""Predictions of a run for the test samples, computed once for each checkpoint, within limits."""

import hashlib
import json
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from explorer.data.background import Task
from explorer.data.cache import LruCache
from explorer.errors import ExplorerError
from explorer.places import Places
from featurestore.errors import UserError

if TYPE_CHECKING:
    from trainer.evaluation.predict import Predictions
    from trainer.runs.saved import SavedRun

MOST_IMPRESSIONS = 300_000
MOST_IMAGES = 200_000
"""Beyond these limits use a command: a page computes for about a minute."""
_cached: "LruCache[Predictions]" = LruCache(16)
_LOCK = Lock()
"""One prediction at a time: each uses all cores, and two of one run would be the same."""


class TooMuchError(ExplorerError):
    """The page would have to compute too many predictions."""


def predictions_of(places: Places, name: str, task: Task[Any]) -> "Predictions":
    """Predict by the newest checkpoint of a run, or return cached predictions.

    Uses the samples of --samples, else the run's own; the run's own store at the snapshot of the training, else the
    newest snapshot of --store. Cost: about 10 s for 20,000 impressions. Raises TooMuchError beyond the limits above,
    TrainerError, FeatureStoreError.
    """
    from trainer.evaluation.predict import predict_run
    from trainer.runs.saved import read_run

    folder = places.run(name)
    task.tell(f"opens {name}")
    saved = read_run(folder, None, places.samples)
    store = _store_of(saved, places)

    def predict() -> "Predictions":
        with _LOCK:
            task.tell(f"predicts with {name}")
            return predict_run(folder, samples=places.samples, store=store)

    return _cached.get(_digest(saved, places, store), predict)


def _store_of(saved: "SavedRun", places: Places) -> str | None:
    """Choose the store: None for the run's own, if it exists."""
    from featurestore.store import FeatureStore

    if saved.config.model.images == "none" or places.store is None:
        return None
    try:
        FeatureStore.open(saved.config.data.store)
    except (UserError, OSError):
        return places.store
    return None


def _digest(saved: "SavedRun", places: Places, store: str | None) -> str:
    """Return an identity of the predictions' inputs; raise TooMuchError if there are too many."""
    from featurestore.store import FeatureStore
    from trainer.comm import SoloComm
    from trainer.runs.saved import open_test

    index = open_test(SoloComm(), saved.config, saved.schema, places.samples)
    if index.num_samples > MOST_IMPRESSIONS:
        raise TooMuchError(
            f"there are {index.num_samples:,} test impressions; a page predicts at most {MOST_IMPRESSIONS:,}"
        )
    commits: list[Any] = []
    for place in saved.places:
        url = store if store is not None and place.setting == "data.store" else place.url
        version = None if url == store else saved.state.version_of(place.name)
        snapshot = FeatureStore.open(url).snapshot(version)
        if snapshot.num_rows > MOST_IMAGES:
            raise TooMuchError(f"{url} has {snapshot.num_rows:,} images; a page predicts with at most {MOST_IMAGES:,}")
        commits.append([snapshot.info.store_id, snapshot.manifest.commit_id, snapshot.version])
    root = Path(index.storage.url)
    files = sorted({each.file for each in index.row_groups}) if root.is_dir() else []
    times = [(root / file).stat().st_mtime_ns for file in files]
    values = [saved.digest, index.storage.url, index.layout_digest, times, commits]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:24]
