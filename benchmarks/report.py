"""One way to show and keep the figures of a benchmark run."""

import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

Figure = float | int | str | bool | None


def write_report(figures: Mapping[str, Figure], path: Path | None = None) -> None:
    """Print `figures` as a table on stdout and, where `path` is given, write them there as one JSON object."""
    table = Table("figure", "value", title="figures of this run")
    for name, value in figures.items():
        table.add_row(name, _shown(value))
    Console().print(table)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(figures), indent=2) + "\n")


def _shown(value: Figure) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
