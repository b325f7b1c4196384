"""The map as Plotly's figure. Drawn as SVG: WebGL's library compiles code at run time, which the pages forbid."""

from collections.abc import Callable
from typing import Any

import numpy as np

from explorer.data.map.layout import Colour, drawn, folder_of, groups
from explorer.data.map.points import MapPoints
from explorer.html.runcharts import Figure, plain
from featurestore.keys import Int64Array

Link = Callable[[int], str | None]
"""The address of the page of a key."""
_SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "pentagon", "star", "hexagram", "circle-open")
_AXIS = {"showticklabels": False, "ticks": "", "showgrid": False, "zeroline": False}


def map_figure(points: MapPoints, colour: Colour, link: Link | None) -> Figure:
    """Draw points in the colours of a quantity; a click on one opens `link` of its key, if there is one."""
    link = link or (lambda key: None)
    chosen = drawn(points)
    if colour in ("folder", "category"):
        names = points.category_N if colour == "category" else [folder_of(uri) or "no folder" for uri in points.uris_N]
        traces = [
            _trace(points, group.points, link, group.name, {"symbol": _SYMBOLS[number % len(_SYMBOLS)]})
            for number, group in enumerate(groups(names, chosen))
        ]
    else:
        values_N = points.ctr_N if colour == "ctr" else points.error_N
        known = np.isfinite(values_N[chosen])
        low, high = np.quantile(values_N[chosen[known]], [0.02, 0.98]) if known.any() else (0.0, 1.0)
        scale = {"colorscale": "Cividis", "cmin": float(low), "cmax": float(high), "showscale": True}
        marker = {"color": [round(float(each), 4) for each in values_N[chosen[known]]], **scale}
        rest = {"color": "#8a8f96", "symbol": "circle-open"}
        traces = [
            _trace(points, chosen[~known], link, "nothing known", rest),
            _trace(points, chosen[known], link, colour, marker),
        ]
    layout = {"xaxis": _AXIS, "yaxis": _AXIS, "hovermode": "closest", "margin": {"l": 8, "r": 8, "t": 8, "b": 8}}
    return {"data": traces, "layout": {**layout, "showlegend": colour in ("folder", "category")}, "links": True}


def _trace(
    points: MapPoints, at: Int64Array, link: Callable[[int], str | None], name: str, marker: dict[str, Any]
) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plain(name)[:40],
        "x": [round(float(each), 3) for each in points.x_N[at]],
        "y": [round(float(each), 3) for each in points.y_N[at]],
        "text": [plain(described(points, int(each))) for each in at],
        "customdata": [link(int(key)) for key in points.keys_N[at]],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"size": 7, "opacity": 0.8, **marker},
    }


def described(points: MapPoints, point: int) -> str:
    """Say what is known of an image: its uri, CTR, error and impressions."""
    known = [points.uris_N[point][-80:]]
    if np.isfinite(points.ctr_N[point]):
        known.append(f"CTR {points.ctr_N[point]:.3f} of {points.impressions_N[point]:,} impressions")
    if np.isfinite(points.error_N[point]):
        known.append(f"error {points.error_N[point]:.3f}")
    return ", ".join(known)
