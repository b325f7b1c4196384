"""Charts of runs, as figures of Plotly."""

from collections.abc import Mapping, Sequence
from typing import Any

from explorer.data.runs.comparing import TITLES, EvaluationReport, RunDifference
from explorer.data.runs.curves import ScalarCurve
from trainer.evaluation.bootstrap import Estimate, SlicedBy

Figure = dict[str, Any]
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
"""Lines of up to six runs, distinguished without colours too."""


def curves(by_name: Mapping[str, ScalarCurve], title: str) -> Figure:
    """Draw curves of one quantity over steps, one for each name."""
    traces = [
        {
            "type": "scatter",
            "mode": "lines" if len(curve.steps) > 12 else "lines+markers",
            "name": plain(name),
            "x": list(curve.steps),
            "y": list(curve.values),
            "line": {"dash": _DASHES[number % len(_DASHES)], "width": 1.5},
        }
        for number, (name, curve) in enumerate(by_name.items())
    ]
    layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": title}}, "showlegend": len(traces) > 1}
    return {"data": traces, "layout": layout}


def slices(sliced: SlicedBy, whole: Estimate, metric: str) -> Figure:
    """Draw a metric of the slices with intervals; the line is the metric of all impressions."""
    names = list(sliced.slices)
    estimates = [each.metrics.get(metric) for each in sliced.slices.values()]
    return _forest(names, estimates, TITLES[metric], whole.value, "dot")


def reliability(evaluation: EvaluationReport) -> Figure:
    """Draw click rate against mean prediction; on the dotted line predictions are right."""
    bins = evaluation.reliability
    end = max([each.predicted for each in bins] + [each.clicked.value or 0.0 for each in bins], default=1.0) * 1.05
    points = {
        "type": "scatter",
        "mode": "markers",
        "x": [each.predicted for each in bins],
        "y": [each.clicked.value for each in bins],
        "error_y": _reach([each.clicked for each in bins]),
    }
    right = {"type": "scatter", "mode": "lines", "x": [0, end], "y": [0, end], "line": {"dash": "dot", "color": "#888"}}
    axes = {"xaxis": {"title": {"text": "mean prediction"}}, "yaxis": {"title": {"text": "click rate"}}}
    return {"data": [points, right], "layout": {**axes, "showlegend": False}}


def differences(found: Sequence[RunDifference]) -> Figure:
    """Draw differences with their intervals, one row for each run; those that span the line at 0 may be chance."""
    estimates = [Estimate(value=each.value, low=each.low, high=each.high) for each in found]
    return _forest([each.run for each in found], estimates, f"difference in {TITLES[found[0].metric]}", 0, "solid")


def _forest(
    names: Sequence[str], estimates: Sequence[Estimate | None], title: str, line_at: float | None, dash: str
) -> Figure:
    """Draw a value with its interval for each name, and a line from top to bottom."""
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [None if each is None else each.value for each in estimates],
        "y": list(range(len(names))),
        "error_x": _reach(estimates),
        "marker": {"size": 9},
    }
    rows = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": [plain(each) for each in names]}
    line = {"type": "line", "x0": line_at, "x1": line_at, "yref": "paper", "y0": 0, "y1": 1}
    layout = {
        "shapes": [] if line_at is None else [{**line, "line": {"dash": dash, "color": "#888888"}}],
        "xaxis": {"title": {"text": title}},
        "yaxis": {**rows, "range": [len(names) - 0.5, -0.5]},
        "showlegend": False,
    }
    return {"data": [trace], "layout": layout}


def plain(text: str) -> str:
    """Escape a text for Plotly, which interprets some HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _reach(estimates: Sequence[Estimate | None]) -> Figure:
    """Return the distances of each interval's ends from its value."""
    above, below = [], []
    for each in estimates:
        known = each is not None and each.value is not None and each.low is not None and each.high is not None
        above.append(max(0.0, each.high - each.value) if known else 0.0)  # type: ignore[union-attr, operator]
        below.append(max(0.0, each.value - each.low) if known else 0.0)  # type: ignore[union-attr, operator]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
