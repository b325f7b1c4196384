"""Plots of an evaluation: PNG files next to its report, and the same for its page, one metric each, to fit a phone."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from featurestore.console.page.plots import Curve, Mark, Plot, Point, intervals
from trainer.evaluation.bootstrap import METRICS
from trainer.evaluation.figures import Bin, Estimate, Figures, Hidden, Measured, SlicedBy

METRIC_TITLES = {
    "logloss": "log loss",
    "auc": "AUC",
    "gauc": "GAUC",
    "calibration": "predicted / clicked",
    "ece": "ECE",
}
_DPI = 120
_COLOR = "#1f5fa8"


def draw_all(figures: Figures, folder: Path) -> list[Path]:
    """Write every plot that the figures have data for into `folder`; returns the files."""
    drawn = {"reliability": reliability(figures.reliability)}
    for name, sliced in figures.sliced_by.items():
        drawn[f"by_{name}"] = by_slice(sliced, figures.whole)
    if figures.missing_curve:
        drawn["missing_curve"] = missing_curve(figures.missing_curve)
    paths = []
    for name, figure in drawn.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=_DPI)
    return paths


def reliability(bins: Sequence[Bin]) -> Figure:
    """Plot click rate against mean prediction, one point for each bin; on the diagonal, predictions are right."""
    figure, axes = _one_panel()
    _points(axes, [each.predicted for each in bins], [each.clicked for each in bins])
    reached = [value for each in bins for value in (each.predicted, each.clicked.value, each.clicked.high) if value]
    end = 1.05 * max(reached)
    axes.plot([0, end], [0, end], color="grey", linewidth=1, linestyle="--")
    axes.set_xlabel("mean prediction")
    axes.set_ylabel("click rate")
    axes.set_title("Reliability, bins of equally many impressions")
    return figure


def by_slice(sliced: SlicedBy, whole: Measured) -> Figure:
    """Plot a panel for each metric, a row for each slice; the band is the interval of all impressions together."""
    names = list(sliced.slices)
    figure = Figure(figsize=(2.6 * len(METRICS) + 1.6, 1.4 + 0.42 * len(names)), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(METRICS), sharey=True)
    for axes, metric in zip(panels, METRICS, strict=True):
        estimates = [each.metrics[metric] for each in sliced.slices.values()]
        _points(axes, estimates, list(range(len(names))))
        everybody = whole.metrics[metric]
        if everybody.low is not None and everybody.high is not None:
            axes.axvspan(everybody.low, everybody.high, color="grey", alpha=0.2, linewidth=0)
        axes.set_title(METRIC_TITLES[metric], fontsize=10)
        axes.tick_params(axis="x", labelsize=8)
        axes.locator_params(axis="x", nbins=4)
    labels = [f"{name}\n({each.impressions:,})" for name, each in sliced.slices.items()]
    panels[0].set_yticks(range(len(names)), labels, fontsize=8)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle(f"By {sliced.title} (impressions in brackets; grey: all)", fontsize=11)
    return figure


def missing_curve(points: Sequence[Hidden]) -> Figure:
    """Plot GAUC against the share of image keys that are hidden."""
    figure, axes = _one_panel()
    shares = [100 * each.share for each in points]
    _points(axes, shares, [each.metrics["gauc"] for each in points])
    axes.plot(shares, [_number(each.metrics["gauc"].value) for each in points], color=_COLOR, linewidth=1)
    axes.set_xlabel("images without a feature, %")
    axes.set_ylabel("GAUC")
    axes.set_title("Images hidden at random")
    return figure


def _one_panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.5, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _points(axes: Axes, x: Sequence[float | Estimate], y: Sequence[float | Estimate]) -> None:
    """Points with the intervals of those coordinates that are estimates; what is not defined is left out."""
    axes.grid(alpha=0.3)
    axes.errorbar(
        [_centre(each) for each in x],
        [_centre(each) for each in y],
        xerr=_reach(x),
        yerr=_reach(y),
        fmt="o",
        color=_COLOR,
        markersize=4,
        capsize=2,
        linewidth=1.2,
    )


def _centre(value: float | Estimate) -> float:
    return _number(value.value) if isinstance(value, Estimate) else value


def _reach(values: Sequence[float | Estimate]) -> list[list[float]] | None:
    """How far each interval reaches below and above its value; a pivotal one may lie beside it."""
    estimates = [each for each in values if isinstance(each, Estimate)]
    if not estimates:
        return None
    below = [max(0.0, _number(each.value) - _number(each.low)) for each in estimates]
    above = [max(0.0, _number(each.high) - _number(each.value)) for each in estimates]
    return [below, above]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def reliability_curve(figures: Figures) -> Plot | None:
    """Draw click rate against mean prediction, one point for each bin; on the diagonal, predictions are right."""
    points = [_point(each.predicted, each.clicked) for each in figures.reliability]
    return Curve(
        title="Reliability, bins of equally many impressions; on the dashed line predictions are right",
        x_name="mean prediction",
        y_name="click rate",
        points=[point for point in points if point],
        has_diagonal=True,
    ).plot()


def slice_plots(figures: Figures) -> Iterator[Plot | None]:
    """Draw each metric with its intervals for all slices; the band is the interval of all impressions together."""
    for metric in METRICS:
        groups = {
            sliced.title: [_mark(name, each.metrics[metric]) for name, each in sliced.slices.items()]
            for sliced in figures.sliced_by.values()
        }
        whole = figures.whole.metrics[metric]
        band = None if whole.low is None or whole.high is None else (whole.low, whole.high)
        title = f"{METRIC_TITLES[metric]} by slice" + ("; shaded: all impressions" if band else "")
        yield intervals(title, groups, band=band)


def missing_images_curve(figures: Figures) -> Plot | None:
    """Draw GAUC against the share of image keys that are hidden; None where none were."""
    points = [_point(100 * each.share, each.metrics["gauc"]) for each in figures.missing_curve]
    return Curve(
        title="GAUC without some of the images",
        x_name="images without a feature, %",
        y_name="GAUC",
        points=[point for point in points if point],
    ).plot()


def difference_plot(differences: Mapping[str, Estimate]) -> Plot | None:
    """Draw the differences of two runs, by title, with their intervals; on the dashed line there is none."""
    marks = [_mark(name, each, signed=True) for name, each in differences.items()]
    return intervals("Difference, with its interval; on the dashed line there is none", marks, line=0.0)


def _mark(name: str, estimate: Estimate, *, signed: bool = False) -> Mark:
    figure = "" if estimate.value is None else f"{estimate.value:{'+' if signed else ''}.4f}"
    return Mark(name, estimate.value, estimate.low, estimate.high, figure)


def _point(x: float, estimate: Estimate) -> Point | None:
    return None if estimate.value is None else Point(x, estimate.value, estimate.low, estimate.high)
