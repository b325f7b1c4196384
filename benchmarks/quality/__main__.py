"""Measure how good our models are, compared with those of FuxiCTR on the same rows and IDs.

    python -m benchmarks.quality [--small] [--json FILE]

Both sides learn the same impressions with the same vocabulary, width, hidden layers, batch size and epochs, each in its
own loop, and are tuned over the same small grid on the last training days. GAUC of both is that of trainer.evaluation,
on the same test rows.
"""

import subprocess
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn

from benchmarks.problems import Problem
from benchmarks.quality.data import NETS, SMALL_USERS, USERS, DataSet, parse, simulated
from benchmarks.report import JsonPath, write_sections
from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import progress_bars, text_column
from trainer.problems import Problem as TrainerProblem

EXAMPLES = """Examples:
  python -m benchmarks.quality --small --json data/bench/quality.json
  python -m benchmarks.quality --photos PHOTOS --labels PHOTOS.csv
  python -m benchmarks.quality --users 8000 --only images --net dnn
  python -m benchmarks.quality --data ml=data/ml/samples --batch-size 512 --only ids --net dnn
  python -m benchmarks.quality --data photos=photos/samples:photos/features --only images --seeds 1 --no-tune
  python -m benchmarks.quality --only ids --set model.multi_hot=sum
  python -m benchmarks.quality --logs logs/frappe --logs logs/journey --seeds 5

A run that has ended is not made again: its figures are kept in DIR/figures.
"""
SECTIONS = ("ids", "images", "cold")
Name = StrEnum("Name", SECTIONS)  # type: ignore[misc]
Net = StrEnum("Net", NETS)  # type: ignore[misc]

app = CommandApp(report=True, failures=(OSError,), rich_markup_mode="rich")


def data_sets(
    folder: Path,
    logs: list[Path],
    texts: list[str],
    users: int,
    pictures: tuple[Path | None, Path | None],
    size: int,
    train_rows: int | None = None,
) -> list[DataSet]:
    """List real logs, a user's own data sets, or the simulated ones: drawn clothes and, if given, photographs."""
    from benchmarks.quality.compare import real_log

    place = folder / f"{users}-users"
    try:
        if logs or texts:
            return [*(real_log(each, size, train_rows) for each in logs), *(parse(text, size) for text in texts)]
        made = [simulated(place / "drawn", users, None, None, size)]
        return made + ([simulated(place / "photos", users, *pictures, size)] if pictures[0] else [])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--data") from error
    except subprocess.CalledProcessError as error:
        raise typer.Exit(1) from error


def settings_of(texts: list[str]) -> dict[str, str]:
    """Read the settings by name."""
    found = dict(text.partition("=")[::2] for text in texts)
    if wrong := [text for text in texts if "=" not in text]:
        raise typer.BadParameter(TrainerProblem.NOT_A_SETTING.of(wrong[0]))
    return found


@app.command(epilog=EXAMPLES)
def main(
    json_path: JsonPath = None,
    folder: Annotated[Path, typer.Option("--dir", help="Of data and figures, which are kept.")] = Path(
        "data/bench/quality"
    ),
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SAMPLES[:STORE]", help="Your own samples in place of simulated ones; repeat it."),
    ] = None,
    small: Annotated[bool, typer.Option("--small", help=f"Simulate {SMALL_USERS:,} people, not {USERS:,}.")] = False,
    users: Annotated[int | None, typer.Option(help="Simulate this number of people instead.", min=100)] = None,
    photos: Annotated[
        Path | None, typer.Option(exists=True, help="Folder of photographs, for a second simulated data set.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(exists=True, help="CSV with their labels, for jobs/make_demo_data.py.")
    ] = None,
    logs: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="A log of tools/real_logs.py or crossmedia demo-data, in place of all else; repeat it.",
        ),
    ] = None,
    train_rows: Annotated[int | None, typer.Option(help="Newest impressions of a log to train on.", min=1)] = None,
    only: Annotated[list[Name] | None, typer.Option(help="Sections; repeat it. Default: all.")] = None,
    nets: Annotated[list[Net] | None, typer.Option("--net", help="Nets; repeat it. Default: all.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each, of which the mean is taken.", min=1)] = 3,
    epochs: Annotated[int, typer.Option(help="Of each run.", min=1)] = 5,
    batch_size: Annotated[int, typer.Option(help="Impressions of a step.", min=1)] = 1024,
    tune: Annotated[bool, typer.Option(help="Choose settings on the last training days.")] = True,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="One setting of our runs.")
    ] = None,
) -> None:
    """Measure how good our models are, compared with those of FuxiCTR on the same rows and IDs.

    The section "cold" is of ours alone: Embedding&MLP with the preset, two epochs, whatever --net and --epochs say.
    """
    from benchmarks.process import fuxictr_python
    from benchmarks.quality.compare import Bench, ids_section, images_section, logs_section
    from benchmarks.quality.heldout import cold_section
    from benchmarks.quality.runs import QualityRunError

    made = {"ids": ids_section, "images": images_section, "cold": cold_section, "logs": logs_section}
    chosen = ["logs"] if logs else [str(name) for name in only or SECTIONS]
    if {"ids", "images", "logs"} & set(chosen) and not fuxictr_python().exists():
        raise QualityRunError(Problem.NO_FUXICTR, ", ".join(chosen))
    given = settings_of(settings or [])
    count = users or (SMALL_USERS if small else USERS)
    sets = data_sets(folder, logs or [], data or [], count, (photos, labels), batch_size, train_rows)
    with progress_bars(text_column(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        bench = Bench(sets, folder, [str(net) for net in nets or NETS], range(seeds), epochs, tune, progress, given)
        sections = [section for name in made if name in chosen for section in made[name](bench)]
    write_sections(sections, json_path)


if __name__ == "__main__":
    run_app(app)
