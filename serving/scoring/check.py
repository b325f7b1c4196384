"""Whether a bundle gives the logits of the run that it was made of: both score the same impressions."""

import contextlib
from dataclasses import dataclass, replace

import numpy as np

from featurestore.published.paths import RunPath, run_path
from featurestore.store import FeatureStore
from serving.bundle.version import ModelVersion
from serving.errors import BrokenBundleError
from serving.scoring.columns import RequestColumns
from serving.scoring.samples import ScoreTable, score_samples
from trainer.comm import SoloComm
from trainer.config.options import ModelConfig
from trainer.runs.saved import TrainedRun, open_test, open_trained
from trainer.samples.index import SampleIndex
from trainer.samples.reader import SampleReader

TOLERANCE = 1e-5
"""Of a logit, where E multiplies in float32 or float64."""
BFLOAT16_TOLERANCE = 0.01
"""Of a logit, where E multiplies in bfloat16. The order of an image's sums depends on how many images the product has,
and where that changes a rounding, a number of the image's vector moves by up to 2 ** -8 of itself."""


@dataclass(frozen=True)
class LogitsCompared:
    """How far the logits of a bundle are from those of its run."""

    impressions: int
    worst: float
    mean: float
    worst_at: str
    """File, row and place of the impression that differs most."""
    tolerance: float
    """What rounding alone may make of a logit of this run."""
    notes: tuple[str, ...]
    """What a reader of the figures should know."""


def compare(
    model: ModelVersion,
    score: ScoreTable,
    *,
    run: RunPath | None = None,
    samples: str | None = None,
    impressions: int | None = None,
) -> LogitsCompared:
    """Score test impressions by `score`, which has the bundle `model`, and by the engine of its run.

    `run`: where the run is now, by default where it was exported from. `samples`: others than the run's own.
    `impressions`: about how many of the first. Images are looked up in the snapshot that the vectors are of. Raises
    BrokenBundleError where the run's checkpoint is another, TrainerError, ServingError.
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
            notes.append(f"the run looks images of {name} up in snapshot {used[name]}; the vectors are of {version}")
    if manifest.id_dtype != "float32":
        error = f"{manifest.id_error.worst:.2g}" if manifest.id_error else "more"
        notes.append(
            f"the bundle's ID rows are {manifest.id_dtype}, the run's float32: logits differ by {error} or so; set "
            "--tolerance by that"
        )
    apart_N = np.abs(online_N - offline_N)
    worst = int(apart_N.argmax())
    return LogitsCompared(
        len(apart_N), float(apart_N[worst]), float(apart_N.mean()), _place(index, worst), tolerance, tuple(notes)
    )


def tolerance_of(model: ModelConfig) -> float:
    """Return by how much rounding may move a logit between two ways of scoring one impression."""
    return BFLOAT16_TOLERANCE if model.compute_dtype == "bfloat16" else TOLERANCE


def _engine_logits(trained: TrainedRun, index: SampleIndex) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    reader = SampleReader(index, trained.schema, batch_size=trained.config.train.eval_batch_size)
    prepared = trained.engine.prepared(reader.batches(), "eval")
    return np.concatenate([trained.engine.predict(each) for each in prepared])


def _source_snapshots(model: ModelVersion) -> dict[str, int]:
    """Return the number of the snapshot of each feature store that the newest vectors are of."""
    found = {}
    for of in model.manifest.vectors:
        manifest = FeatureStore.open(model.vectors_url(of)).snapshot().manifest
        found[of.store] = (manifest.mirrors or of.source).version
    return found


def _first(index: SampleIndex, impressions: int | None) -> SampleIndex:
    """Keep the first row groups, until they have `impressions` of them; all where that is None."""
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
