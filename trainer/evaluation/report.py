"""Evaluations of runs and comparisons of two: what is measured, printed, written and plotted."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from featurestore.console import files, output, page
from featurestore.errors import StorageError
from featurestore.published.paths import RunPath, written_locally
from featurestore.text import count_text
from trainer.comm import Comm
from trainer.errors import TrainerError
from trainer.evaluation import bootstrap
from trainer.evaluation.predict import Impressions, predict, predict_source, slicings_of
from trainer.problems import Problem
from trainer.runs.saved import TEST, EvaluatedRun, RunSource, open_source

METRIC_TITLES = {"logloss": "log loss", "auc": "AUC", "gauc": "GAUC", "calibration": "predicted / clicked"}
_COLOR = "#1f5fa8"


def evaluate_run(
    source: RunSource,
    comm: Comm,
    *,
    resamples: int = 1000,
    by: Sequence[str] = (),
    out: RunPath | None = None,
    quiet: bool = False,
) -> bootstrap.Evaluation | None:
    """Evaluate a run and write the report; every rank calls it, rank 0 measures, writes and returns the figures.

    `by`: fields of one id to cut by as well. The report goes to `out`, by default RUN/evaluation; unless `quiet` it is
    printed. Raises TrainerError or FeatureStoreError.
    """
    console = output.text_console(quiet=quiet or comm.rank != 0)
    with contextlib.closing(open_source(source, comm)) as opened:
        count = f"{opened.test.num_samples:,} impressions, {count_text(comm.size, 'rank')}"
        output.print_line(console, f"{opened.saved.checkpoint}: {count}")
        logit_N, impressions = predict(opened, by)
        cuts = slicings_of(opened, impressions)
        about = _about(opened, resamples)
    if comm.rank != 0:
        return None
    about["notes"] += _few(impressions)
    figures = replace(bootstrap.measure_all(logit_N, impressions, cuts, resamples), notes=tuple(about["notes"]))
    out = out or source.folder / "evaluation"
    write_report(out, "report.json", {**about, **asdict(figures)}, reliability(figures.reliability))
    show(console, about, figures, out)
    return figures


def compare_runs(source: RunSource, against: RunPath, comm: Comm, *, resamples: int, out: RunPath | None) -> None:
    """Compare a run with the newest checkpoint of the run in folder `against`; print and write the differences.

    All impressions together, and those of new ads by themselves. The samples and the store that `source` names are
    those of both. They are written to comparison.json in `out`, by default RUN/evaluation. Every rank calls it. Raises
    TrainerError, FeatureStoreError; DataError where the test samples of the two differ.
    """
    console, ours = output.text_console(quiet=comm.rank != 0), predict_source(source, comm)
    baseline = predict_source(replace(source, folder=against, checkpoint=None), comm)
    bootstrap.check_same_impressions(ours, baseline, (str(source.folder), str(against)))
    if comm.rank != 0:
        return
    found, is_new_N = bootstrap.compare(ours, baseline, resamples=resamples), bootstrap.new_to_both(ours, baseline)
    num_new = int(is_new_N.sum())
    of_new = bootstrap.compare(ours, baseline, resamples=resamples, only_N=is_new_N) if num_new else {}
    titled = {METRIC_TITLES[name]: each for name, each in found.items()}
    titled |= {f"{METRIC_TITLES[name]}, new ads": each for name, each in of_new.items()}
    title = f"{source.folder} against {against}, {len(ours.logit_N):,} impressions"
    table = Table("", "run", "against", "difference", f"{bootstrap.LEVEL:.0%} interval", "p", title=title)
    for name, each in titled.items():
        is_shown = each.users is None or each.users >= bootstrap.LEAST_USERS_SHOWN
        values = (number(value if is_shown else None) for value in (each.ours, each.baseline, each.value))
        p_value = "-" if each.p_value is None or not is_shown else f"{each.p_value:.3g}"
        table.add_row(name, *values, range_of(each) if is_shown else "-", p_value)
    output.print_table(console, table)
    notes = [f"{folder}: {note}" for folder, run in ((source.folder, ours), (against, baseline)) for note in run.notes]
    notes += _few(ours.impressions)
    count = f"{num_new:,} impressions are" if num_new != 1 else "1 impression is"
    output.print_line(console, f"{count} of new ads, which neither run was trained on")
    for note in notes:
        output.print_line(console, f"note: {note}")
    written = {
        "run": str(source.folder),
        "against": str(against),
        "impressions": len(ours.logit_N),
        "bootstrap": {"resamples": resamples, "level": bootstrap.LEVEL},
        "differences": {name: asdict(each) for name, each in found.items()},
        "new_ads": {"impressions": num_new, "differences": {name: asdict(each) for name, each in of_new.items()}},
        "notes": notes,
    }
    folder = out or source.folder / "evaluation"
    write_report(folder, "comparison.json", written)
    output.print_line(console, f"written to {folder / 'comparison.json'}")


def reliability(bins: Sequence[bootstrap.Bin]) -> Figure:
    """Plot click rate against mean prediction, one point for each bin; on the diagonal, predictions are right."""
    figure = Figure(figsize=(5.5, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    rates = [(each.clicked.value, each.clicked.low, each.clicked.high) for each in bins]
    value_K, low_K, high_K = np.array(rates, np.float64).T  # None becomes NaN, which is not drawn
    axes.errorbar(
        [each.predicted for each in bins],
        value_K,
        yerr=(value_K - low_K, high_K - value_K),
        fmt="o",
        color=_COLOR,
        markersize=4,
        capsize=2,
        linewidth=1.2,
    )
    reached = [value for each in bins for value in (each.predicted, each.clicked.value, each.clicked.high) if value]
    end = 1.05 * max(reached)
    axes.plot([0, end], [0, end], color="grey", linewidth=1, linestyle="--")
    axes.set_xlabel("mean prediction")
    axes.set_ylabel("click rate")
    axes.set_title("Reliability, bins of equally many impressions")
    return figure


def _about(opened: EvaluatedRun, resamples: int) -> dict[str, Any]:
    """Describe run, data and settings of the evaluation; after the predictions, whose missing lookups are counted."""
    num_missing = opened.missing_lookups()
    return {
        "run": str(opened.saved.folder),
        "checkpoint": opened.saved.checkpoint.name,
        "samples": opened.test.storage.full(TEST),
        "stores": {name: record.model_dump() for name, record in opened.stores.items()},
        "missing": opened.config.data.missing,
        "bootstrap": {"resamples": resamples, "level": bootstrap.LEVEL},
        "missing_lookups": num_missing,
        "notes": [*opened.notes, *opened.saved.notes_on_missing(num_missing)],
    }


def _few(impressions: Impressions) -> list[str]:
    """Explain why no metric is given, if the test samples have too few users."""
    users, least = len(np.unique(impressions.user_N)), bootstrap.LEAST_USERS_SHOWN
    text = f"the test samples have {count_text(users, 'user')}; metrics are given of {least} users or more"
    return [text] if users < least else []


def write_report(folder: RunPath, name: str, values: Mapping[str, Any], plot: Figure | None = None) -> None:
    """Write `values` as JSON to file `name` of a folder, and save the plot, for the command's page too.

    Raises TrainerError where the disk refuses.
    """
    try:
        with written_locally(folder) as local:
            if plot is not None:
                page.save_plot(plot, local / "reliability.png")
            files.write_json(local / name, values)
    except (OSError, StorageError) as failure:
        raise TrainerError(Problem.REPORT_NOT_WRITTEN, name, folder, failure) from failure


def show(console: Console, about: Mapping[str, Any], figures: bootstrap.Evaluation, folder: RunPath) -> None:
    """Print the metrics of all impressions with their intervals, and those of the slices without."""
    whole = Table(title=f"{about['run']}, {about['checkpoint']}")
    for heading in (f"{figures.whole.impressions:,} impressions", "value", f"{bootstrap.LEVEL:.0%} interval"):
        whole.add_column(heading, justify="left" if heading.endswith("impressions") else "right")
    for metric, shown in METRIC_TITLES.items():
        estimate = figures.whole.metrics[metric]
        whole.add_row(shown, number(estimate.value), range_of(estimate))
    output.print_table(console, whole)
    slices = Table(title="Slices")
    slices.add_column("")
    for heading in ("impressions", *METRIC_TITLES.values()):
        slices.add_column(heading, justify="right")
    for sliced in figures.sliced_by.values():
        slices.add_section()
        slices.add_row(Text(sliced.title, style="bold"))
        for name, each in sliced.slices.items():
            values = (number(each.metrics[metric].value) for metric in METRIC_TITLES)
            slices.add_row(f"  {name}", f"{each.impressions:,}", *values)
    output.print_table(console, slices)
    for note in about["notes"]:
        output.print_line(console, f"note: {note}")
    output.print_line(console, f"written to {folder}")


def number(value: float | None) -> str:
    """Format with four digits after the point; a dash for an undefined value."""
    return "-" if value is None else f"{value:.4f}"


def range_of(estimate: bootstrap.Estimate) -> str:
    """Format an interval, as 0.6241 to 0.6279; a dash where there is none."""
    return "-" if estimate.low is None else f"{number(estimate.low)} to {number(estimate.high)}"
