"""python -m trainer.experiments: the paper's tables 3, 4, 5, 6 and 8 and its figure 5 on a person's own samples."""

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from trainer.config import Config, load_config
from trainer.errors import ConfigError
from trainer.experiments.grid import Experiment, chosen, experiments
from trainer.files import read_mapping, replace_file
from trainer.main import on_ranks

if TYPE_CHECKING:
    from trainer.comm import Comm
    from trainer.experiments.runs import Grid

USAGE = 2
EXAMPLES = """
Examples:

    python -m trainer.experiments images --seeds 5

    horovodrun -np 2 python -m trainer.experiments all --config my.yaml --out data/experiments

    python -m trainer.experiments similarity --semantic-config data/semantic/settings.yaml

Runs are kept in OUT/runs and found again by their settings: an interrupted call goes on where it was, and two tables
share the runs that they have in common. Tables and plots go to OUT/results.json, OUT/RESULTS.md and OUT/plots. What is
found is what is written: no order of the variants is assumed.
"""

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
Name = StrEnum("Name", [*experiments(), "all"])  # type: ignore[misc]


@app.command(epilog=EXAMPLES)
def main(
    names: Annotated[list[Name], typer.Argument(help="Tables to make.")],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant; 5 show a difference of one deviation.")] = 5,
    file: Annotated[Path | None, typer.Option("--config", help="YAML file over the default preset.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="One setting of all runs.")
    ] = None,
    semantic: Annotated[
        Path | None,
        typer.Option(
            "--semantic-config",
            help="YAML file with data.samples and data.schema_file of samples with semantic IDs, and their tables.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs and the results.")] = Path("data/experiments"),
) -> None:
    """Train every variant over some seeds, and say which differences are more than noise."""
    try:
        loaded: Config | ConfigError = load_config(file, settings or ())
        of_semantic = None if semantic is None else tuple(settings_of(semantic))
    except ConfigError as failure:
        loaded, of_semantic = failure, None
    wanted = chosen([str(name) for name in names])

    def work(config: Config, comm: "Comm") -> None:
        from trainer.experiments.runs import Grid

        make(wanted, range(seeds), Grid(out, file, tuple(settings or ()), of_semantic), comm)

    raise typer.Exit(on_ranks(loaded, work))


def make(wanted: Sequence[Experiment], seeds: Sequence[int], grid: "Grid", comm: "Comm") -> None:
    """Runs what is missing, then writes and prints the tables. Every rank calls it."""
    from trainer.experiments.plots import draw
    from trainer.experiments.tables import as_markdown, as_values, rows_of

    console = Console(quiet=comm.rank != 0, highlight=False)
    results, sections = {}, []
    for experiment in wanted:
        variants = [v for v in experiment.variants if grid.semantic_settings or not v.needs_semantic_ids]
        if len(variants) < len(experiment.variants):
            console.print(f"{experiment.name}: without --semantic-config, rows with semantic IDs are left out")
        figures: dict[str, list[dict[str, float]]] = {}
        for seed in seeds:
            for variant in variants:
                measured = grid.measure(variant, seed, comm)
                figures.setdefault(variant.name, []).append(measured)
                console.print(f"{experiment.name}: {variant.name}, seed {seed}: GAUC {measured['gauc']:.4f}")
        rows = rows_of(experiment, figures)
        results[experiment.name] = {"title": experiment.title, "rows": as_values(rows), "runs": figures}
        sections.append(as_markdown(experiment, rows, len(seeds)))
        if comm.rank == 0:
            draw(experiment.title, rows, grid.folder / "plots" / f"{experiment.name}.png")
            replace_file(grid.folder / "RESULTS.md", "\n".join(sections))
            replace_file(grid.folder / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    console.print(Markdown("\n".join(sections)))
    console.print(f"written to {grid.folder}", soft_wrap=True)


def settings_of(file: Path) -> list[str]:
    """The values of a YAML file as settings, to be laid over others."""
    from trainer.checkpoint import flat

    return [f"{name}={value}" for name, value in flat(read_mapping(file, "--semantic-config ", ConfigError))]


if __name__ == "__main__":
    app()
