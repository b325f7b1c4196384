"""One picture for each table: GAUC of every variant with its interval."""

from collections.abc import Sequence
from pathlib import Path

from trainer.experiments.tables import Row


def draw(title: str, rows: Sequence[Row], path: Path) -> None:
    """Writes a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.9 + 0.38 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        gauc = row.metrics["gauc"]
        marker = "o" if row.gain is not None else "s"
        axes.errorbar(gauc.mean, place, xerr=gauc.half_width, fmt=marker, color="C0", capsize=3)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("GAUC, mean over seeds with its 95 % interval")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
