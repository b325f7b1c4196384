"""Results of all calls: results.json for programs, RESULTS.md for people; a table stays until a call makes it anew."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from featurestore.console.page import save_plot
from featurestore.errors import StorageError
from featurestore.parsing import parse_json
from featurestore.published.paths import RunPath, read_file, write_file, write_json_file, written_locally
from trainer.errors import TrainerError
from trainer.experiments.grid import Experiment, experiments
from trainer.experiments.tables import Row, as_markdown, as_values, rows_of, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Figures = Mapping[str, Sequence[Mapping[str, float]]]
"""Of one table: the metrics of each variant, by its name, in the order of seeds."""
Facts = Mapping[str, Mapping[str, Any]]
"""Of one table of feature stores: what is known of each, by the name of its variant."""


def read(folder: RunPath) -> dict[str, Figures]:
    """Read the figures of the tables that are there, by name. Raises TrainerError."""
    return {name: runs for name, (runs, _) in _read(folder).items()}


def _read(folder: RunPath) -> dict[str, tuple[Figures, Facts]]:
    file = folder / "results.json"
    try:
        tables = parse_json(read_file(file))
        return {name: (table["runs"], table.get("facts", {})) for name, table in tables.items()}
    except FileNotFoundError:
        return {}
    except (OSError, StorageError, ValueError, KeyError, TypeError, AttributeError) as failure:
        raise TrainerError(
            f"{file} cannot be read: {failure!r}; remove it, and make its tables again: their runs are still there"
        ) from failure


def add(folder: RunPath, name: str, figures: Figures, facts: Facts | None = None) -> None:
    """Put one table among those that are there, in the order of the paper, and draw its picture."""
    tables = {**_read(folder), name: (figures, facts or {})}
    made = [each.as_made(tables[each.name][0]) for each in experiments().values() if each.name in tables]
    values = {
        each.name: {
            "title": each.title,
            "rows": as_values(rows_of(each, *tables[each.name])),
            "runs": tables[each.name][0],
            **({"facts": tables[each.name][1]} if each.of_stores else {}),
        }
        for each in made
    }
    experiment = experiments()[name].as_made(figures)
    rows = rows_of(experiment, *tables[name])
    with written_locally(folder / "plots") as plots:
        plots.mkdir(parents=True, exist_ok=True)
        plot = draw_stores(experiment.title, rows) if experiment.of_stores else draw(experiment.title, rows)
        save_plot(plot, plots / f"{name}.png")
    write_file(folder / "RESULTS.md", "\n".join(section(each, *tables[each.name]) for each in made))
    write_json_file(folder / "results.json", values)


def section(experiment: Experiment, figures: Figures, facts: Facts | None = None) -> str:
    """Write one table in Markdown."""
    num_seeds = len(next(iter(figures.values())))
    return as_markdown(experiment, rows_of(experiment, figures, facts), num_seeds)


def show_section(console: Console, experiment: Experiment, figures: Figures, facts: Facts | None = None) -> None:
    """Print one table."""
    show(console, experiment, rows_of(experiment, figures, facts), len(next(iter(figures.values()))))


def draw(title: str, rows: Sequence[Row]) -> "Figure":
    """Plot the GAUC of every row with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.9 + 0.38 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        gauc = row.metrics["gauc"]
        marker = "o" if row.gain is not None else "s"
        axes.errorbar(gauc.mean, place, xerr=gauc.half_width, fmt=marker, color="C0", capsize=3)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("GAUC, mean over seeds with its 95 % interval")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    return figure


def draw_stores(title: str, rows: Sequence[Row]) -> "Figure":
    """Plot GAUC against the bytes of each store: all impressions, and those of new ads."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, metric, name in zip(panels, ("gauc", "new_ad_gauc"), ("all ads", "new ads"), strict=True):
        for number, row in enumerate(rows):
            value, size_bytes = row.metrics.get(metric), row.facts.get("bytes")
            if value is not None and size_bytes:
                marker, color = "so"[bool(row.gain)], f"C{number % 10}"
                axes.errorbar(
                    size_bytes, value.mean, yerr=value.half_width, fmt=marker, color=color, capsize=3, label=row.name
                )
        axes.set_xscale("log")
        axes.set_xlabel("bytes of the store")
        axes.set_title(f"GAUC, {name}, with its 95 % interval", loc="left", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure
