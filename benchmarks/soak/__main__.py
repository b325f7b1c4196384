"""Put a server under a bounded load for a long time, and say whether its memory grows and its answers get slower.

    python -m benchmarks.soak scorer --demo data/demo --minutes 60 --json data/bench/soak-scorer.json

A copy of the demo is served on loopback. Clients ask for all kinds of things, right ones and wrong ones, while each
minute something changes beside the server: another version of the model and newer vectors, or a new snapshot.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from benchmarks.problems import Problem
from benchmarks.report import JsonPath, write_sections
from featurestore.console.commandline import CommandApp, run_app

app = CommandApp(report=True, failures=(OSError,))


@app.command()
def main(
    of: Annotated[Literal["scorer", "features", "explorer"], typer.Argument(help="The server.")],
    demo: Annotated[Path, typer.Option(help="Folder of crossmedia demo; a copy of it is served.")] = Path("data/demo"),
    minutes: Annotated[float, typer.Option(min=1, help="Of load.")] = 60.0,
    warm_minutes: Annotated[float, typer.Option(min=0, help="At the beginning, not in the slopes.")] = 10.0,
    rate: Annotated[float, typer.Option(min=0.1, help="Requests a second.")] = 10.0,
    folder: Annotated[Path, typer.Option("--dir", help="Of copy, log and samples; emptied.")] = Path("data/bench/soak"),
    json_path: JsonPath = None,
) -> None:
    """Put a server under a bounded load for a long time."""
    if not demo.is_dir():
        raise typer.BadParameter(Problem.NO_DEMO.of(demo), param_hint="--demo")
    if minutes < warm_minutes + 4:
        raise typer.BadParameter(Problem.TOO_SHORT.of(minutes), param_hint="--minutes")
    from benchmarks.soak.measure import run_soak

    soak = run_soak(of, demo, folder, rate, 60 * minutes)
    write_sections(soak.sections(f"soak of the {of}", 60 * warm_minutes), json_path)


if __name__ == "__main__":
    run_app(app)
