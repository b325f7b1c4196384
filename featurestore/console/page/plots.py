"""Plots of report pages as shapes of SVG: bars, values with intervals, and curves.

Positions from left to right are percentages and texts have a fixed size, so a plot fits a phone as well as a screen
without being scaled, and its colours are those of the page, also in the dark: matplotlib's SVG can do neither. Where
ticks are is matplotlib's choice.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from featurestore.text import printable

_ROW_PX, _HEADING_PX, _AXIS_PX = 38, 30, 24
_CURVE_PX, _CURVE_TOP_PX, _CURVE_BOTTOM_PX = 280, 24, 230
_LONGEST_NAME = 34  # characters that fit next to a figure on a phone; the table has the whole name
_MOST_MARKS = 60  # of a plot; what comes after them is in the table alone
_EDGE = 2.0  # percent that are free on each side
_CURVE_LEFT, _CURVE_RIGHT = 13.0, 97.0


@dataclass(frozen=True)
class Shape:
    """An element of SVG; `text` is what is written in it."""

    tag: Literal["line", "rect", "circle", "text"]
    attributes: Mapping[str, str]
    text: str = ""


@dataclass(frozen=True)
class Plot:
    """A drawing of a page; `words` say what it shows, for those who do not see it."""

    title: str
    words: str
    height_px: int
    shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class Mark:
    """A value that is drawn; `low` and `high` are its interval, `figure` its text as in the table."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    figure: str = ""
    is_good: bool = False


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A scale from numbers to percent: `low` to `high` becomes `left` to `right`."""

    low: float
    high: float
    left: float = _EDGE
    right: float = 100 - _EDGE

    @classmethod
    def around(cls, values: Sequence[float], left: float = _EDGE, right: float = 100 - _EDGE) -> "Axis":
        """Make an axis that has all values, and a little more on each side."""
        low, high = min(values), max(values)
        room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low=low - room, high=high + room, left=left, right=right)

    def at(self, value: float) -> float:
        """Return the place of a number, in percent."""
        return self.left + (self.right - self.left) * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Choose about four round numbers on the axis."""
        from matplotlib.ticker import MaxNLocator

        found = (float(each) for each in MaxNLocator(nbins=4).tick_values(self.low, self.high))
        return [each for each in found if self.low <= each <= self.high]


def bars(title: str, marks: Sequence[Mark] | Mapping[str, Sequence[Mark]]) -> Plot | None:
    """Draw a bar from zero for each value; None where there is none. `marks` of a mapping have headings."""
    groups = _groups(marks)
    values = [_number(mark.value) for group in groups.values() for mark in group]
    if not values:
        return None
    axis = Axis(low=min(0.0, *values), high=max(0.0, *values) or 1.0, left=0, right=100)

    def bar(mark: Mark, y: int) -> list[Shape]:
        start, end = sorted((axis.at(0), axis.at(_number(mark.value))))
        kind = "bar good" if mark.is_good else "bar"
        return [
            _shape("rect", kind="track", x="0", y=f"{y + 20}", width="100%", height="10"),
            _shape("rect", kind=kind, x=_percent(start), y=f"{y + 20}", width=_percent(end - start), height="10"),
        ]

    shapes, height = _rows(groups, bar)
    return Plot(title, _words(title, groups), height, tuple(shapes))


def intervals(
    title: str,
    marks: Sequence[Mark] | Mapping[str, Sequence[Mark]],
    *,
    band: tuple[float, float] | None = None,
    line: float | None = None,
) -> Plot | None:
    """Draw a dot with its interval for each value; None where there is none.

    `band`: a range that is shaded behind all; `line`: a number that all are compared with.
    """
    groups = _groups(marks)
    found = [each for group in groups.values() for mark in group for each in (mark.value, mark.low, mark.high)]
    values = [each for each in (*found, *(band or ()), line) if each is not None]
    if not any(groups.values()):
        return None
    axis = Axis.around(values)

    def dot(mark: Mark, y: int) -> list[Shape]:
        at, middle = _percent(axis.at(_number(mark.value))), f"{y + 26}"
        shapes = []
        if mark.low is not None and mark.high is not None:
            ends = {"x1": _percent(axis.at(mark.low)), "x2": _percent(axis.at(mark.high))}
            shapes.append(_shape("line", kind="interval", y1=middle, y2=middle, **ends))
        return [*shapes, _shape("circle", kind="dot good" if mark.is_good else "dot", cx=at, cy=middle, r="5")]

    rows, height = _rows(groups, dot)
    behind = []
    if band is not None:
        start, end = axis.at(band[0]), axis.at(band[1])
        behind.append(
            _shape("rect", kind="band", x=_percent(start), y="0", width=_percent(end - start), height=f"{height}")
        )
    for tick in axis.ticks():
        at = _percent(axis.at(tick))
        behind.append(_shape("line", kind="grid", x1=at, x2=at, y1="0", y2=f"{height}"))
        rows.append(_tick(axis.at(tick), height + 16, tick))
    if line is not None:
        at = _percent(axis.at(line))
        behind.append(_shape("line", kind="reference", x1=at, x2=at, y1="0", y2=f"{height}"))
    return Plot(title, _words(title, groups), height + _AXIS_PX, (*behind, *rows))


@dataclass(frozen=True)
class Point:
    """A point of a curve; `low` and `high` are the interval of `y`."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points over an axis, joined by lines or with the diagonal on which x and y are equal."""

    title: str
    x_name: str
    y_name: str
    points: Sequence[Point] = field(default_factory=tuple)
    has_diagonal: bool = False

    def plot(self) -> Plot | None:
        """Draw the curve; None where there are no points."""
        if not self.points:
            return None
        reached = [each for point in self.points for each in (point.y, point.low, point.high) if each is not None]
        x_values = [point.x for point in self.points]
        if self.has_diagonal:
            reached = x_values = [0.0, *reached, *x_values]
        x_axis = Axis.around(x_values, _CURVE_LEFT, _CURVE_RIGHT)
        y_axis = Axis.around(reached, _CURVE_BOTTOM_PX, _CURVE_TOP_PX)
        shapes = [*self._axes(x_axis, y_axis)]
        if self.has_diagonal:
            end = min(x_axis.high, y_axis.high)
            shapes.append(_segment(x_axis, y_axis, Point(0, 0), Point(end, end), "reference"))
        else:
            for first, second in zip(self.points, self.points[1:], strict=False):
                shapes.append(_segment(x_axis, y_axis, first, second, "joined"))
        for point in self.points:
            if point.low is not None and point.high is not None:
                shapes.append(
                    _segment(x_axis, y_axis, Point(point.x, point.low), Point(point.x, point.high), "interval")
                )
            at = {"cx": _percent(x_axis.at(point.x)), "cy": f"{y_axis.at(point.y):.1f}"}
            shapes.append(_shape("circle", kind="dot", r="4.5", **at))
        points = "; ".join(f"{_short(point.y)} at {_short(point.x)}" for point in self.points)
        return Plot(self.title, f"{self.title}. {self.y_name} by {self.x_name}: {points}", _CURVE_PX, tuple(shapes))

    def _axes(self, x_axis: Axis, y_axis: Axis) -> list[Shape]:
        shapes = [_text(0, 14, self.y_name, "name"), _text(_CURVE_RIGHT, _CURVE_PX - 8, self.x_name, "name", "end")]
        for tick in y_axis.ticks():
            y = f"{y_axis.at(tick):.1f}"
            shapes.append(_shape("line", kind="grid", x1="0", x2="100%", y1=y, y2=y))
            shapes.append(_text(0, y_axis.at(tick) - 4, _short(tick), "tick"))
        shapes += [_tick(x_axis.at(tick), _CURVE_BOTTOM_PX + 18, tick) for tick in x_axis.ticks()]
        return shapes


def _groups(marks: Sequence[Mark] | Mapping[str, Sequence[Mark]]) -> dict[str, list[Mark]]:
    """Return groups of the marks that have a number, each by its heading; of very many the first ones."""
    groups, free, found = marks if isinstance(marks, Mapping) else {"": marks}, _MOST_MARKS, {}
    for name, group in groups.items():
        drawn = [each for each in group if each.value is not None and math.isfinite(each.value)][:free]
        free -= len(drawn)
        if drawn:
            found[name] = drawn
    return found


def _rows(groups: Mapping[str, Sequence[Mark]], drawn: Callable[[Mark, int], list[Shape]]) -> tuple[list[Shape], int]:
    """Return the shapes of all rows, names and figures among them, and their height."""
    shapes: list[Shape] = []
    y = 0
    for heading, group in groups.items():
        if heading:
            shapes.append(_text(0, y + 20, heading, "heading"))
            y += _HEADING_PX
        for mark in group:
            shapes += [
                _text(0, y + 14, _cut(mark.name), "name"),
                _text(100, y + 14, mark.figure or _short(_number(mark.value)), "figure", "end"),
                *drawn(mark, y),
            ]
            y += _ROW_PX
    return shapes, y


def _words(title: str, groups: Mapping[str, Sequence[Mark]]) -> str:
    """Say in words what a plot of groups shows."""
    parts = []
    for heading, group in groups.items():
        figures = "; ".join(f"{mark.name}: {mark.figure or _short(_number(mark.value))}" for mark in group)
        parts.append(f"{heading}: {figures}" if heading else figures)
    return f"{title}. {'. '.join(parts)}"


def _segment(x_axis: Axis, y_axis: Axis, first: Point, second: Point, kind: str) -> Shape:
    ends = {"x1": _percent(x_axis.at(first.x)), "x2": _percent(x_axis.at(second.x))}
    return _shape("line", kind=kind, y1=f"{y_axis.at(first.y):.1f}", y2=f"{y_axis.at(second.y):.1f}", **ends)


def _tick(percent: float, y: float, value: float) -> Shape:
    anchor = "start" if percent < 8 else "end" if percent > 92 else "middle"
    return _text(percent, y, _short(value), "tick", anchor)


def _text(percent: float, y: float, text: str, kind: str, anchor: str = "start") -> Shape:
    attributes = {"class": kind, "x": _percent(percent), "y": f"{y:.1f}", "text-anchor": anchor}
    return Shape("text", attributes, printable(text))


def _shape(tag: Literal["line", "rect", "circle"], *, kind: str, **attributes: str) -> Shape:
    return Shape(tag, {"class": kind, **attributes})


def _percent(value: float) -> str:
    return f"{value:.2f}%"


def _short(value: float) -> str:
    """Format a number of an axis, or of a value without a text of its own."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _number(value: float | None) -> float:
    assert value is not None
    return value
