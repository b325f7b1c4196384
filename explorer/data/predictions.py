"""Predictions of a run for the test samples, computed once for each checkpoint and cached on disk, within limits.

Letters of shapes: N impressions.
"""

import hashlib
import io
import json
import zipfile
from dataclasses import fields
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from explorer.data.background import Task
from explorer.data.cache import FileCache
from explorer.errors import ExplorerError
from explorer.places import Places
from featurestore.console.files import replace_file
from featurestore.errors import StorageError, UserError
from featurestore.text import refusal

if TYPE_CHECKING:
    from trainer.evaluation.predict import Predictions
    from trainer.runs.saved import SavedRun

MOST_IMPRESSIONS = 300_000
MOST_IMAGES = 200_000
"""Beyond these limits use a command: a page computes for about a minute, and leaves few files."""
_FILES = FileCache("predictions-", ".npz", most=64)
_LOCK = Lock()
"""One prediction at a time: each uses all cores, and two of one run would be the same."""


class TooMuchError(ExplorerError):
    """The page would have to compute too many predictions."""


def predictions_of(places: Places, name: str, task: Task[Any], cache: Path | None = None) -> "Predictions":
    """Predict by the newest checkpoint of a run, or read cached predictions.

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
    file = _FILES.path(_digest(saved, places, store), cache)
    with _LOCK:
        if (known := _read(file)) is not None:
            return known
        task.tell(f"predicts with {name}")
        found = predict_run(folder, samples=places.samples, store=store)
        _write(file, found)
        return found


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


def _read(file: Path) -> "Predictions | None":
    from trainer.evaluation.predict import Predictions
    from trainer.evaluation.slices import Impressions

    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        notes = tuple(json.loads(str(found.pop("notes"))))
        logit_N, is_new_ad_N = found.pop("logit_N"), found.pop("is_new_ad_N")
        columns: dict[str, Any] = {each.name: found.get(each.name) for each in fields(Impressions)}
        return Predictions(logit_N, Impressions(**columns), notes, is_new_ad_N)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        file.unlink(missing_ok=True)  # not ours, or damaged: computed again
        return None


def _write(file: Path, found: "Predictions") -> None:
    from trainer.evaluation.slices import Impressions

    columns = {each.name: getattr(found.impressions, each.name) for each in fields(Impressions)}
    arrays: dict[str, Any] = {name: values for name, values in columns.items() if values is not None}
    buffer = io.BytesIO()
    assert found.is_new_ad_N is not None
    arrays |= {"logit_N": found.logit_N, "is_new_ad_N": found.is_new_ad_N, "notes": np.array(json.dumps(found.notes))}
    np.savez(buffer, **arrays)
    try:
        replace_file(file, buffer.getvalue())
    except OSError as error:
        raise StorageError(f"cannot write {file}: {refusal(error)}") from error
    _FILES.prune(file.parent)
