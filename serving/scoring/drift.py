"""How far a bundle's logits differ from those of its run."""

import contextlib
from dataclasses import dataclass, replace

import numpy as np

from featurestore.published.paths import RunPath, run_path
from featurestore.store import FeatureStore
from serving.bundle.open import ModelVersion
from serving.errors import BrokenBundleError
from serving.scoring.request import RequestColumns
from serving.scoring.samples import ScoreTable, score_samples
from trainer.comm import SoloComm
from trainer.config import ModelConfig
from trainer.runs.saved import TrainedRun, open_test, open_trained
from trainer.samples.index import SampleIndex
from trainer.samples.reader import SampleReader

TOLERANCE = 1e-5
"""Largest difference of a logit if E multiplies in float32 or float64."""
BFLOAT16_TOLERANCE = 0.01
"""Largest difference of a logit if E multiplies in bfloat16. The order of the sums of an image depends on the number of
images in the product; this may round a number of its vector differently, by up to 2 ** -8 of its value."""


@dataclass(frozen=True)
class LogitsCompared:
    """Differences between the logits of a bundle and of its run."""

    impressions: int
    worst: float
    mean: float
    worst_at: str
    """File, row and position of the impression that differs most."""
    tolerance: float
    """Largest difference of a logit that rounding alone may cause for this run."""
    notes: tuple[str, ...]
    """Notes for the user on these differences."""


def compare(
    model: ModelVersion,
    score: ScoreTable,
    *,
    run: RunPath | None = None,
    samples: str | None = None,
    impressions: int | None = None,
) -> LogitsCompared:
    """Score test impressions by `score`, which serves the bundle `model`, and by the engine of its run.

    `run`: the run's current address, by default the one it was exported from. `samples`: by default the run's own.
    `impressions`: approximate number of impressions, by default all. Images are looked up in the snapshot that the
    vectors match. Raises BrokenBundleError if the run's checkpoint is a different one, TrainerError, ServingError.
    """
    manifest = model.manifest
    snapshots = _source_snapshots(model)
    first = next(iter(snapshots.values()), None)
    with contextlib.closing(
        open_trained(run or run_path(manifest.run), SoloComm(), which=manifest.checkpoint, store_version=first)
    ) as trained:
        if trained.saved.digest != manifest.checkpoint_digest:
            raise BrokenBundleError(
                f"{trained.saved.checkpoint} is not the checkpoint that version {manifest.version} was made of: its "
                f"digest is {trained.saved.digest[:12]} instead of {manifest.checkpoint_digest[:12]}; name the run by "
                "--run"
            )
        index = _first(open_test(SoloComm(), trained.config, trained.schema, samples), impressions)
        columns = RequestColumns(model.schema, model.fields).sources
        online_N = np.concatenate(list(score_samples(score, index, columns)))
        offline_N = _engine_logits(trained, index)
        notes = trained.saved.notes_on_missing(trained.missing_lookups())
        tolerance = tolerance_of(trained.config.model)
        used = {name: record.version for name, record in trained.stores.items()}
    for name, version in snapshots.items():
        if used.get(name, version) != version:
            notes.append(f"the run reads images of {name} from snapshot {used[name]}, but the vectors match {version}")
    if manifest.id_dtype != "float32":
        notes.append(
            f"the bundle's ID rows are {manifest.id_dtype}, the run's float32: logits differ by that; set --tolerance "
            "to what you accept"
        )
    apart_N = np.abs(online_N - offline_N)
    worst = int(apart_N.argmax())
    return LogitsCompared(
        len(apart_N), float(apart_N[worst]), float(apart_N.mean()), _place(index, worst), tolerance, tuple(notes)
    )


def tolerance_of(model: ModelConfig) -> float:
    """Return the largest difference that rounding may cause between two ways of scoring an impression."""
    return BFLOAT16_TOLERANCE if model.compute_dtype == "bfloat16" else TOLERANCE


def _engine_logits(trained: TrainedRun, index: SampleIndex) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    reader = SampleReader(index, trained.schema, batch_size=trained.config.train.eval_batch_size)
    prepared = trained.engine.prepared(reader.batches(), "eval")
    return np.concatenate([trained.engine.predict(each) for each in prepared])


def _source_snapshots(model: ModelVersion) -> dict[str, int]:
    """Return the number of each feature store's snapshot that its newest vectors match."""
    found = {}
    for of in model.manifest.vectors:
        manifest = FeatureStore.open(model.vectors_url(of)).snapshot().manifest
        found[of.store] = (manifest.mirrors or of.source).version
    return found


def _first(index: SampleIndex, impressions: int | None) -> SampleIndex:
    """Keep the first row groups with at least `impressions` impressions together; all if that is None."""
    if impressions is None:
        return index
    starts = np.cumsum([0, *(each.num_samples for each in index.row_groups)])[:-1]
    return replace(index, row_groups=index.row_groups[: int((starts < impressions).sum())])


def _place(index: SampleIndex, impression: int) -> str:
    for row_group in index.row_groups:
        if impression < row_group.num_samples:
            return f"impression {impression} of the row group from row {row_group.first_row} of {row_group.file}"
        impression -= row_group.num_samples
    raise AssertionError("an impression of the index")
