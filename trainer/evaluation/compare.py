"""Compare two models on the same impressions: the difference of AUC and GAUC, its interval, and its p-value.

Both sides are measured on the same resamples of users, so what makes a day easy or hard for both cancels out. Where a
side has several runs (seeds), its metric is their mean, and a resample draws runs as well as users: the interval covers
both the users and the luck of training.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from featurestore.console.output import print_line, print_table, text_console
from featurestore.console.page import current_page
from featurestore.published.paths import RunPath
from trainer.comm import Comm
from trainer.errors import DataError
from trainer.evaluation.bootstrap import LEVEL, METRICS, Estimate, Float, MetricSums, bootstrap, interval
from trainer.evaluation.predict import Predictions, predict_run
from trainer.evaluation.report import METRIC_TITLES, differences, number, range_of, write_report
from trainer.runs.saved import RunSource


@dataclass(frozen=True, kw_only=True)
class Difference(Estimate):
    """A metric of ours - that of the baseline. `p_value`: two-sided, for a true difference of 0; None if undefined."""

    metric: str
    ours: float | None
    baseline: float | None
    p_value: float | None


@dataclass(frozen=True, kw_only=True)
class NewAdsCompared:
    """The part of the impressions whose ad no compared run was trained on, and its differences; none where it is empty.

    An ad that one of the runs knows from training is left out: that run would win by having seen it.
    """

    impressions: int
    differences: dict[str, Difference]


def compare_runs(
    source: RunSource,
    against: RunPath,
    comm: Comm,
    *,
    resamples: int,
    out: RunPath | None,
    json_file: Path | None,
) -> None:
    """Compare a run with the newest checkpoint of the run in folder `against`; print and write the differences.

    All impressions together, and those of new ads by themselves. The samples and the store that `source` names are
    those of both. They are written to comparison.json in `out`, by default RUN/evaluation, and to `json_file`. Every
    rank calls it. Raises TrainerError, FeatureStoreError; DataError where the test samples of the two differ.
    """
    console, places = text_console(quiet=comm.rank != 0), source.places
    ours = predict_run(source.folder, comm, checkpoint=source.checkpoint, **places)
    baseline = predict_run(against, comm, **places)
    _check_same_impressions([ours, baseline], [str(source.folder), str(against)])
    if comm.rank != 0:
        return
    found = compare([ours], [baseline], resamples=resamples)
    new_ads = compare_new_ads([ours], [baseline], resamples=resamples)
    titled = {METRIC_TITLES[name]: each for name, each in found.items()}
    titled |= {f"{METRIC_TITLES[name]}, new ads": each for name, each in new_ads.differences.items()}
    title = f"{source.folder} against {against}, {len(ours.logit_N):,} impressions"
    table = Table("", "run", "against", "difference", f"{LEVEL:.0%} interval", "p", title=title)
    for name, each in titled.items():
        values = (number(value) for value in (each.ours, each.baseline, each.value))
        p_value = "-" if each.p_value is None else f"{each.p_value:.3g}"
        table.add_row(name, *values, range_of(each), p_value)
    print_table(console, table)
    notes = [f"{folder}: {note}" for folder, run in ((source.folder, ours), (against, baseline)) for note in run.notes]
    count = f"{new_ads.impressions:,} impressions are" if new_ads.impressions != 1 else "1 impression is"
    print_line(console, f"{count} of new ads, which neither run was trained on")
    if page := current_page():
        page.add_plot(differences(titled))
    for note in notes:
        print_line(console, f"note: {note}")
    written = {
        "run": str(source.folder),
        "against": str(against),
        "impressions": len(ours.logit_N),
        "bootstrap": {"resamples": resamples, "level": LEVEL},
        "differences": {name: asdict(each) for name, each in found.items()},
        "new_ads": asdict(new_ads),
        "notes": notes,
    }
    folder = out or source.folder / "evaluation"
    write_report(folder, "comparison.json", written, json_file)
    print_line(console, f"written to {folder / 'comparison.json'}")


def compare(
    ours: Sequence[Predictions],
    baseline: Sequence[Predictions],
    *,
    metrics: Sequence[str] = ("gauc", "auc"),
    resamples: int = 1000,
    seed: int = 0,
    only_N: NDArray[np.bool_] | None = None,
) -> dict[str, Difference]:
    """Measure the paired difference of each metric between runs `ours` and `baseline`, one or more on each side.

    `only_N`: which impressions to measure, by default all; resamples are of all users either way, so those of a slice
    are the ones of the whole.

    p = (1 + resamples whose difference lies as far from the one found as that does from 0) / (1 + resamples), the
    bootstrap test with the null put at the centre (Hall and Wilson, Biometrics 1991); so never below 1 / (1 + R).
    Raises DataError where the runs did not predict the same impressions.
    """
    if not ours or not baseline:
        raise ValueError("each side needs the predictions of one run at least")
    _check_same_impressions([*ours, *baseline], [f"run {n}" for n in range(len(ours) + len(baseline))])
    users_U, user_N = np.unique(ours[0].impressions.user_N, return_inverse=True)
    label_N = ours[0].impressions.label_N.astype(np.float64)
    chosen = slice(None) if only_N is None else only_N
    sums = [MetricSums(each.logit_N[chosen], label_N[chosen], user_N[chosen]) for each in (*ours, *baseline)]
    replicates = bootstrap(sums, len(users_U), resamples, seed)
    value_TM = np.stack([each.value_M for each in replicates])
    draws_TRM = np.stack([each.draws_RM for each in replicates])
    sides = slice(0, len(ours)), slice(len(ours), None)
    value_2M = np.stack([value_TM[side].mean(axis=0) for side in sides])
    random = np.random.default_rng([seed, 1])
    draws_RM = np.subtract(*(_mean_of_drawn(draws_TRM[side], random) for side in sides))
    found = {}
    for name in metrics:
        column = METRICS.index(name)
        values = value_2M[0, column], value_2M[1, column]
        found[name] = _difference(name, *values, draws_RM[:, column], sums[0].users_M[column])
    return found


def compare_new_ads(
    ours: Sequence[Predictions],
    baseline: Sequence[Predictions],
    *,
    metrics: Sequence[str] = ("gauc", "auc"),
    resamples: int = 1000,
    seed: int = 0,
) -> NewAdsCompared:
    """Compare as `compare` does, on the impressions of ads that no run of either side was trained on.

    The resamples of users are those of `compare` with the same seed. Raises as that does; no impression is new where a
    run's predictions do not tell (`is_new_ad_N` is None).
    """
    _check_same_impressions([*ours, *baseline], [f"run {n}" for n in range(len(ours) + len(baseline))])
    is_new_N = np.ones(len(ours[0].logit_N), np.bool_)
    for each in (*ours, *baseline):
        is_new_N &= False if each.is_new_ad_N is None else each.is_new_ad_N
    differences = {}
    if is_new_N.any():
        differences = compare(ours, baseline, metrics=metrics, resamples=resamples, seed=seed, only_N=is_new_N)
    return NewAdsCompared(impressions=int(is_new_N.sum()), differences=differences)


def _mean_of_drawn(draws_SRM: Float, random: np.random.Generator) -> Float:
    """The mean over S runs drawn with replacement, for each resample, (R, M)."""
    runs, resamples = draws_SRM.shape[:2]
    drawn_RS = random.integers(runs, size=(resamples, runs))
    means_RM: Float = draws_SRM[drawn_RS, np.arange(resamples)[:, None]].mean(axis=1)
    return means_RM


def _difference(name: str, ours: float, baseline: float, draws_R: Float, users: int) -> Difference:
    value = ours - baseline
    estimate = interval(value, draws_R, users=users)
    defined_R = draws_R[~np.isnan(draws_R)]
    # A difference of rounding errors (equal models, another order of sums) counts as 0.
    as_far = np.abs(defined_R - value) >= abs(value) - 1e-12
    p_value = float((1 + as_far.sum()) / (1 + len(defined_R))) if estimate.low is not None else None
    mine, theirs = (None if np.isnan(each) else float(each) for each in (ours, baseline))
    return Difference(**asdict(estimate), metric=name, ours=mine, baseline=theirs, p_value=p_value)


def _check_same_impressions(predictions: Sequence[Predictions], names: Sequence[str]) -> None:
    first = predictions[0].impressions
    for run, other in zip(names, (each.impressions for each in predictions), strict=True):
        same = len(first.label_N) == len(other.label_N) and all(
            np.array_equal(getattr(first, name), getattr(other, name)) for name in ("label_N", "user_N", "ad_N")
        )
        if not same:
            raise DataError(
                f"{run} predicted other impressions ({len(other.label_N):,}) than {names[0]} "
                f"({len(first.label_N):,}); evaluate both on the same test samples, by --samples"
            )
