"""Plots of an evaluation for its page: what plots.py draws as PNG files, one metric each, so that they fit a phone."""

from collections.abc import Iterator, Mapping

from featurestore.console.page.plots import Curve, Mark, Plot, Point, intervals
from trainer.evaluation.bootstrap import METRICS, Estimate
from trainer.evaluation.measure import Figures
from trainer.evaluation.plots import METRIC_TITLES


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
