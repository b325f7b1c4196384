"""The gate of models: a trained run against the one that is in use, on the evaluation rows of the new one.

Both score the same rows, each with the newest features of its stores. A model is worse where GAUC falls, or log loss
rises, by more than its limit and by more than noise: the interval of the paired difference, over users, is on that side
of zero. So a small day, on which nothing can be told, stops no model that is as good.
"""

from dataclasses import dataclass, replace

import numpy as np

from featurestore.errors import UserError
from featurestore.published.channels import VersionName
from featurestore.published.paths import RunPath
from featurestore.upkeep.promotion import GateResult
from trainer.comm import Comm, SoloComm
from trainer.compat.scores import drawn_batches, score
from trainer.errors import CheckpointError, DataNotFoundError
from trainer.evaluation.bootstrap import LEVEL
from trainer.evaluation.compare import Difference, compare
from trainer.evaluation.impressions import Impressions
from trainer.evaluation.predict import Predictions
from trainer.runs.saved import TEST, SavedRun, open_test, read_run
from trainer.samples.reader import SampleIndex, open_index

MAX_MODEL_GAUC_LOSS, MAX_MODEL_LOGLOSS_RISE = 0.002, 0.002
"""Of a new model, against the one in use."""
MOST_ROWS = 200_000
"""Evaluation rows that are scored; of more, about as many are drawn."""
_GATES = (("gauc", MAX_MODEL_GAUC_LOSS, 1), ("logloss", MAX_MODEL_LOGLOSS_RISE, -1))
"""Metric, limit, and the sign of a better value."""
_SAME_DRAW = {"data": {"shuffle_window_groups": 128}, "train": {"eval_batch_size": 8192}}


@dataclass(frozen=True, kw_only=True)
class RunInUse:
    """The run whose model is in use: its folder, the checkpoint that was published and its digest."""

    folder: RunPath
    checkpoint: str
    digest: str


def gate_model(
    folder: RunPath, checkpoint: str | None, in_use: RunInUse, *, store_version: VersionName | None = None
) -> list[GateResult]:
    """Compare the run in `folder` with the one in use on its evaluation rows; what cannot be compared does not hold.

    `store_version`: the snapshot of the new run's first store. For one rank.
    """
    try:
        return _compared(read_run(folder, checkpoint), in_use, store_version, SoloComm())
    except UserError as failure:
        text = f"it cannot be compared with the model in use: {failure}"
        return [GateResult(gate="comparison", value=None, limit=0, holds=False, text=text)]


def _compared(ours: SavedRun, in_use: RunInUse, store_version: VersionName | None, comm: Comm) -> list[GateResult]:
    if ours.digest == in_use.digest:
        return [GateResult(gate="comparison", value=0, limit=0, holds=True, text="it is the checkpoint that is in use")]
    theirs = read_run(in_use.folder, in_use.checkpoint)
    if theirs.digest != in_use.digest:
        raise CheckpointError(f"{theirs.path} has been trained again since it was published")
    if ours.config.data.test_days == []:
        raise DataNotFoundError(
            f"{ours.folder} has no evaluation rows yet; name an earlier day's run, or wait for the next day's samples"
        )
    rows = open_test(comm, ours.config, ours.schema, None)
    same = open_index(comm, ours.config.data.samples, TEST, theirs.schema, ours.config.data.test_days)
    new, old = _predictions(ours, rows, store_version, comm), _predictions(theirs, same, None, comm)
    found = compare([new], [old], metrics=[metric for metric, _, _ in _GATES])
    where = f"{len(new.logit_N):,} impressions of {', '.join(ours.config.data.test_days or ()) or 'the test samples'}"
    return [_result(found[metric], limit, sign, where) for metric, limit, sign in _GATES]


def _predictions(saved: SavedRun, index: SampleIndex, version: VersionName | None, comm: Comm) -> Predictions:
    """Score the rows; those drawn of many are the same for every run."""
    drawn = replace(saved, config=saved.config.changed(**_SAME_DRAW))
    batches = drawn_batches(drawn, index, None if index.num_samples <= MOST_ROWS else MOST_ROWS)
    versions = {place.name: version if number == 0 else None for number, place in enumerate(drawn.places)}
    snapshots = {place.name: drawn.snapshot(place, versions[place.name]) for place in drawn.places}
    ad = drawn.schema.new_ad_field
    rows = Impressions(
        label_N=np.concatenate([batch.label_B for batch in batches]),
        user_N=np.concatenate([batch.group_id_B for batch in batches]),
        ad_N=np.concatenate([batch.fields[ad].values_N for batch in batches]),
        image_N=None,
        history_N=None,
        time_s_N=None,
    )
    return Predictions(score(drawn, snapshots, batches, comm).logit_N, rows)


def _result(found: Difference, limit: float, sign: int, where: str) -> GateResult:
    if found.value is None or found.low is None or found.high is None or found.ours is None or found.baseline is None:
        text = f"{found.metric} of {where} has no interval: fewer than ten users with and without a click"
        return GateResult(gate=found.metric, value=None, limit=limit, holds=False, text=text)
    best = found.high if sign > 0 else found.low
    holds = sign * found.value >= -limit or sign * best >= 0
    text = (
        f"{found.metric} is {found.ours:.4f}, that of the model in use {found.baseline:.4f}: {found.value:+.4f} "
        f"({LEVEL:.0%} interval {found.low:+.4f} to {found.high:+.4f}) on {where}"
    )
    return GateResult(gate=found.metric, value=found.value, limit=limit, holds=holds, text=text)
