"""One way to show and keep the figures of a benchmark run."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.problems import Problem
from featurestore.console.files import write_json
from featurestore.console.output import figure, print_table, text_console
from featurestore.errors import UserError

Figure = float | int | str | bool | None


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
        grid = {f"{self.prefix}{row}_{name}": value for row, line in self.grid.items() for name, value in line.items()}
        return {**self.figures, **grid}

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


def this_run(**sizes: Figure) -> Section:
    """Make the section of a run's own sizes, and of the cores that it may use."""
    return Section("this run", {**sizes, "cores": len(os.sched_getaffinity(0))})


def _writable(path: Path | None) -> Path | None:
    """Before the work, so that its figures are not lost at the end. Ranks do it at once."""
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise UserError(Problem.JSON_NOT_WRITTEN, path, error) from error
    return path


JsonPath = Annotated[Path | None, typer.Option("--json", help="Write the figures here as well.", callback=_writable)]
"""The option that every benchmark has."""


def write_sections(sections: Sequence[Section], path: Path | None = None) -> None:
    """Print each section on stdout and, where `path` is given, write all figures there as one flat JSON object."""
    console = text_console()
    for section in sections:
        for table in section.tables():
            print_table(console, table)
    if path is not None:
        write_json(path, {name: value for section in sections for name, value in section.flat().items()})
