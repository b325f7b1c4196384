"""Charts of runs, settings and maps, as figures of Plotly."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from explorer.data.map import Colour, MapPoints, drawn, groups, names_of
from explorer.data.runs.comparing import TITLES, EvaluationReport, RunDifference
from explorer.data.runs.curves import ScalarCurve
from featurestore.keys import Int64Array
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
    figure = _forest(names, estimates, TITLES[metric])
    if whole.value is not None:
        line = {"type": "line", "x0": whole.value, "x1": whole.value, "yref": "paper", "y0": 0, "y1": 1}
        figure["layout"]["shapes"] = [{**line, "line": {"dash": "dot", "color": "#888888"}}]
    return figure


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
    figure = _forest([each.run for each in found], estimates, f"difference in {TITLES[found[0].metric]}")
    line = {"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1}
    figure["layout"]["shapes"] = [{**line, "line": {"color": "#888888"}}]
    return figure


def values(by_name: Mapping[str, Estimate], title: str) -> Figure:
    """Draw a value with its interval for each name."""
    return _forest(list(by_name), list(by_name.values()), title)


def _forest(names: Sequence[str], estimates: Sequence[Estimate | None], title: str) -> Figure:
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [None if each is None else each.value for each in estimates],
        "y": list(range(len(names))),
        "error_x": _reach(estimates),
        "marker": {"size": 9},
    }
    rows = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": [plain(each) for each in names]}
    layout = {
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


@dataclass(frozen=True)
class PointLinks:
    """The addresses of a point's page, by its key, and of its picture, by its uri; None where there is none."""

    page: Callable[[int], str | None]
    picture: Callable[[str], str | None]


_SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "pentagon", "star", "hexagram", "circle-open")
_AXIS = {"showticklabels": False, "ticks": "", "showgrid": False, "zeroline": False}
_FOUND = {"size": 13, "opacity": 1, "symbol": "circle-open", "color": "#d9480f", "line": {"width": 3}}


def map_figure(points: MapPoints, colour: Colour, links: PointLinks, found: Int64Array | None = None) -> Figure:
    """Draw points in the colours of a quantity, and rings around those that a search has `found`.

    A point shows its picture, and a click opens its page. The legend hides and shows groups.
    """
    chosen = drawn(points)
    if colour == "ctr":
        known = np.isfinite(points.ctr_N[chosen])
        low, high = np.quantile(points.ctr_N[chosen[known]], [0.02, 0.98]) if known.any() else (0.0, 1.0)
        scale = {"colorscale": "Cividis", "cmin": float(low), "cmax": float(high), "showscale": True}
        marker = {"color": [round(float(each), 4) for each in points.ctr_N[chosen[known]]], **scale}
        rest = {"color": "#8a8f96", "symbol": "circle-open"}
        traces = [
            _trace(points, chosen[~known], links, "no impression", rest),
            _trace(points, chosen[known], links, "shown as an ad", marker),
        ]
    else:
        traces = [
            _trace(points, group.points, links, group.name, {"symbol": _SYMBOLS[number % len(_SYMBOLS)]})
            for number, group in enumerate(groups(names_of(points, colour), chosen))
        ]
    if found is not None and len(found):
        traces.append(_trace(points, found, links, "found", _FOUND))
    layout = {"xaxis": _AXIS, "yaxis": _AXIS, "hovermode": "closest", "margin": {"l": 8, "r": 8, "t": 8, "b": 8}}
    return {"data": traces, "layout": {**layout, "showlegend": True, "dragmode": "pan"}, "links": True, "zoom": True}


def _trace(points: MapPoints, at: Int64Array, links: PointLinks, name: str, marker: dict[str, Any]) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plain(name)[:40],
        "x": [round(float(each), 3) for each in points.x_N[at]],
        "y": [round(float(each), 3) for each in points.y_N[at]],
        "text": [plain(described(points, int(each))) for each in at],
        "customdata": [[links.page(int(points.keys_N[each])), links.picture(points.uris_N[each])] for each in at],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"size": 7, "opacity": 0.8, **marker},
    }


def described(points: MapPoints, point: int) -> str:
    """Describe an image: its uri, category, CTR and impressions."""
    uri, ctr, category = points.uris_N[point][-80:], points.ctr_N[point], points.category_N[point]
    named = f"{uri}, category {category}" if category else uri
    return f"{named}, CTR {ctr:.3f} of {points.impressions_N[point]:,} impressions" if np.isfinite(ctr) else named
