"""Plots of an evaluation, as figures of matplotlib: PNG files next to its report, SVG on its page."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer.evaluation.bootstrap import METRICS
from trainer.evaluation.figures import Bin, Estimate, Figures, Hidden, Measured, SlicedBy

METRIC_TITLES = {
    "logloss": "log loss",
    "auc": "AUC",
    "gauc": "GAUC",
    "calibration": "predicted / clicked",
    "ece": "ECE",
}
_COLOR = "#1f5fa8"


def draw_all(figures: Figures) -> dict[str, Figure]:
    """Draw every plot that the figures have data for; by the names of their files."""
    drawn = {"reliability": reliability(figures.reliability)}
    for name, sliced in figures.sliced_by.items():
        drawn[f"by_{name}"] = by_slice(sliced, figures.whole)
    if figures.missing_curve:
        drawn["missing_curve"] = missing_curve(figures.missing_curve)
    return drawn


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


def differences(by_title: Mapping[str, Estimate]) -> Figure:
    """Plot the differences of two runs with their intervals; on the dashed line there is none."""
    figure, axes = _one_panel()
    _points(axes, list(by_title.values()), list(range(len(by_title))))
    axes.axvline(0, color="grey", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(by_title)), list(by_title))
    axes.set_ylim(len(by_title) - 0.5, -0.5)
    axes.set_title("Difference, with its interval")
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
