"""One way to show and keep the figures of a benchmark run."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from featurestore.console.files import write_json
from featurestore.console.output import figure, print_table, text_console
from featurestore.console.page.plots import Mark, Plot, bars
from featurestore.console.page.recording import current_page
from featurestore.errors import UserError

Figure = float | int | str | bool | None
_RATIO = re.compile(r"_(vs|over)_|_ratio$")
_OF_A_UNIT = re.compile(r"(?P<rest>.+?)_(?P<unit>[a-z]+_per_s|us|ms|s|bytes|kb|mb|gb|share)")
_UNITS = {"us": "microseconds", "ms": "milliseconds", "s": "seconds", "kb": "kB", "mb": "MB", "gb": "GB"}


@dataclass(frozen=True)
class Section:
    """Figures that belong together: single ones, and a grid of those that are compared by row and column.

    In the JSON a figure of the grid is called ROW_COLUMN, with `prefix` before it.
    """

    title: str
    figures: Mapping[str, Figure] = field(default_factory=dict)
    grid: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)
    prefix: str = ""

    def flat(self) -> dict[str, Figure]:
        """Return all figures by their names in the JSON."""
        cells = {
            f"{self.prefix}{row}_{column}": value for row, cells in self.grid.items() for column, value in cells.items()
        }
        return {**self.figures, **cells}

    def plots(self) -> list[Plot]:
        """Draw bars of what can be compared: ratios, figures of one unit by their names, each column of the grid."""
        compared: dict[str, list[Mark]] = {}
        for name, value in self.figures.items():
            if _RATIO.search(name):
                compared.setdefault("ratios", []).append(_mark(name, value))
            elif match := _OF_A_UNIT.fullmatch(name):
                title = _UNITS.get(match["unit"], match["unit"])
                compared.setdefault(title, []).append(_mark(match["rest"], value))
        for row, cells in self.grid.items():
            for column, value in cells.items():
                compared.setdefault(column, []).append(_mark(row, value))
        found = (bars(title.replace("_", " "), marks) for title, marks in compared.items() if len(marks) > 1)
        return [plot for plot in found if plot]

    def tables(self) -> list[Table]:
        """Return the tables of the figures."""
        shown = []
        if self.figures:
            table = Table("figure", title=self.title)
            table.add_column("value", justify="right")
            for name, value in self.figures.items():
                table.add_row(name, figure(value))
            shown.append(table)
        if self.grid:
            columns = list(dict.fromkeys(column for cells in self.grid.values() for column in cells))
            table = Table("", title=None if shown else self.title)
            for column in columns:
                table.add_column(column.replace("_", " "), justify="right")
            for row, cells in self.grid.items():
                table.add_row(row.replace("_", " "), *(figure(cells[c]) if c in cells else "" for c in columns))
            shown.append(table)
        return shown


def _mark(name: str, value: Figure) -> Mark:
    number = float(value) if isinstance(value, float | int) and not isinstance(value, bool) else None
    return Mark(name.replace("_", " "), number, figure=figure(value))


def _writable(path: Path | None) -> Path | None:
    """Before the work, so that its figures are not lost at the end."""
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise UserError(f"cannot write --json {path}: {error}") from error
        if path.is_dir():
            raise UserError(f"cannot write --json {path}: it is a folder")
    return path


JsonPath = Annotated[Path | None, typer.Option("--json", help="Write the figures here as well.", callback=_writable)]
"""The option that every benchmark has."""


def write_sections(sections: Sequence[Section], path: Path | None = None) -> None:
    """Print each section on stdout and, where `path` is given, write all figures there as one flat JSON object."""
    console = text_console()
    for section in sections:
        for table in section.tables():
            print_table(console, table)
        if page := current_page():
            for plot in section.plots():
                page.add_plot(plot)
    if path is not None:
        figures = {name: value for section in sections for name, value in section.flat().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, figures)


def write_report(figures: Mapping[str, Figure], path: Path | None = None) -> None:
    """Print `figures` as a table on stdout and, where `path` is given, write them there as one JSON object."""
    write_sections([Section("figures of this run", figures)], path)
