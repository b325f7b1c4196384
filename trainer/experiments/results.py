"""Results of all calls: results.json for programs, RESULTS.md for people; a table stays until a call makes it anew."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from featurestore.errors import StorageError
from featurestore.published.paths import RunPath, read_file, write_file, write_json_file, written_locally
from featurestore.text.parsing import parse_json
from trainer.errors import TrainerError
from trainer.experiments.grid import Experiment, experiments
from trainer.experiments.tables import Row, as_markdown, as_values, rows_of, show

Figures = Mapping[str, Sequence[Mapping[str, float]]]
"""Of one table: the metrics of each variant, by its name, in the order of seeds."""


def read(folder: RunPath) -> dict[str, Figures]:
    """Read the figures of the tables that are there, by name. Raises TrainerError."""
    file = folder / "results.json"
    try:
        tables = parse_json(read_file(file))
        return {name: table["runs"] for name, table in tables.items()}
    except FileNotFoundError:
        return {}
    except (OSError, StorageError, ValueError, KeyError, TypeError, AttributeError) as failure:
        raise TrainerError(
            f"{file} cannot be read: {failure!r}; remove it, and make its tables again: their runs are still there"
        ) from failure


def add(folder: RunPath, name: str, figures: Figures) -> None:
    """Put one table among those that are there, in the order of the paper, and draw its picture."""
    tables = {**read(folder), name: figures}
    made = [each for each in experiments().values() if each.name in tables]
    values = {
        each.name: {
            "title": each.title,
            "rows": as_values(rows_of(each, tables[each.name])),
            "runs": tables[each.name],
        }
        for each in made
    }
    experiment = experiments()[name]
    with written_locally(folder / "plots") as plots:
        draw(experiment.title, rows_of(experiment, figures), plots / f"{name}.png")
    write_file(folder / "RESULTS.md", "\n".join(section(each, tables[each.name]) for each in made))
    write_json_file(folder / "results.json", values)


def section(experiment: Experiment, figures: Figures) -> str:
    """Write one table in Markdown."""
    num_seeds = len(next(iter(figures.values())))
    return as_markdown(experiment, rows_of(experiment, figures), num_seeds)


def show_section(console: Console, experiment: Experiment, figures: Figures) -> None:
    """Print one table."""
    show(console, experiment, rows_of(experiment, figures), len(next(iter(figures.values()))))


def draw(title: str, rows: Sequence[Row], path: Path) -> None:
    """Write the GAUC of every row with its interval as a PNG."""
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
