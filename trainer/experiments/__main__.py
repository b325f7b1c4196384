"""python -m trainer.experiments: the paper's tables 3, 4, 5, 6 and 8 and its figure 5 on a person's own samples."""

from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import print_line, text_console
from trainer.config.config import Config, load_config
from trainer.errors import ConfigError
from trainer.experiments.grid import Experiment, chosen, experiments
from trainer.files import read_mapping
from trainer.main import on_ranks

if TYPE_CHECKING:
    from trainer.comm import Comm
    from trainer.experiments.runs import Grid

NAMES = "\n".join(f"- `{name}`: {each.title}" for name, each in experiments().items())
EXAMPLES = f"""
Tables:

{NAMES}
- `all`

Examples:

    python -m trainer.experiments images --seeds 5

    horovodrun -np 2 python -m trainer.experiments all --config my.yaml --out data/experiments

    python -m trainer.experiments similarity --semantic-config data/samples-sid/settings.yaml

    horovodrun -np 2 python -m trainer.experiments exactness

    python -m trainer.experiments encoders --stores vgg=data/features,s3://bucket/efficientnet

Runs are kept in OUT/runs and found again by their settings, samples and stores' snapshots: an interrupted call
continues from the last checkpoint of the run that it was in (train.checkpoint_every), and tables share the runs that
they have in common. Tables and plots go to OUT/results.json, OUT/RESULTS.md and OUT/plots, next to those of earlier
calls. What is found is what is written: no order of the variants is assumed.
"""

app = CommandApp(report=True, on_ranks=True, rich_markup_mode="markdown")
Name = StrEnum("Name", [*experiments(), "all"])  # type: ignore[misc]


@app.command(epilog=EXAMPLES)
def main(
    names: Annotated[list[Name], typer.Argument(help="Tables to make.")],
    seeds: Annotated[
        int, typer.Option(min=1, max=10_000, help="Runs of each variant; 5 show a difference of one deviation.")
    ] = 5,
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
    stores: Annotated[
        str | None,
        typer.Option(
            help="Feature stores of the table encoders, with commas: an address each, or NAME=ADDRESS; the first is"
            " the baseline.",
        ),
    ] = None,
    out: Annotated[str, typer.Option(help="Folder or address of the runs and the results.")] = "data/experiments",
) -> None:
    """Train every variant over some seeds, and say which differences are more than noise."""
    wanted = on_stores(chosen([str(name) for name in names]), stores, "encoders" in names)

    def work(config: Config, comm: "Comm") -> None:
        from featurestore.published.paths import run_path
        from trainer.experiments.runs import Grid

        of_semantic = None if semantic is None else tuple(settings_of(semantic))
        make(wanted, range(seeds), Grid(run_path(out), file, tuple(settings or ()), of_semantic, comm), comm)

    raise typer.Exit(on_ranks(lambda: _without_resume(load_config(file, settings or ())), work))


def _without_resume(config: Config) -> Config:
    if config.run.resume is not None:
        raise ConfigError(f"run.resume={config.run.resume}: every run continues from its own checkpoints; leave it out")
    return config


def make(wanted: Sequence[Experiment], seeds: Sequence[int], grid: "Grid", comm: "Comm") -> None:
    """Run what is missing, then write and print the tables. Every rank calls it.

    Raises TrainerError, FeatureStoreError; what any of the runs lacks, before the first one.
    """
    from trainer.experiments import results

    console = text_console(quiet=comm.rank != 0)
    comm.on_rank_0(lambda: results.read(grid.folder))
    planned = [
        (each, [(variant, seed, grid.plan(variant, seed)) for seed in seeds for variant in grid.variants_of(each)])
        for each in wanted
    ]
    made = []
    for experiment, runs in planned:
        if len(runs) < len(experiment.variants) * len(seeds):
            why = "the store's rows have too few dimensions for the others"
            if any(variant.needs_semantic_ids for variant in experiment.variants):
                why = "without --semantic-config, rows with semantic IDs are left out"
            print_line(console, f"{experiment.name}: {why}")
        figures: dict[str, list[dict[str, float]]] = {}
        for variant, seed, run in runs:
            measured = grid.figures(run)
            figures.setdefault(variant.name, []).append(measured)
            print_line(console, f"{experiment.name}: {variant.name}, seed {seed}: GAUC {measured['gauc']:.4f}")
        facts = grid.facts(experiment)
        comm.on_rank_0(partial(results.add, grid.folder, experiment.name, figures, facts))
        made.append((experiment, figures, facts))
    for experiment, figures, facts in made:
        results.show_section(console, experiment, figures, facts)
    print_line(console, f"written to {grid.folder}")


def on_stores(wanted: Sequence[Experiment], stores: str | None, is_asked: bool) -> list[Experiment]:
    """Give the tables of stores the stores that were named, and leave these tables out where none was named.

    Raises typer.BadParameter, also where a table of stores was asked for by its name and no store was named.
    """
    if stores is None:
        if is_asked:
            raise typer.BadParameter("encoders compares feature stores: name two at least", param_hint="--stores")
        return [each for each in wanted if not each.of_stores]
    if not any(each.of_stores for each in wanted):
        raise typer.BadParameter("it is for the table encoders", param_hint="--stores")
    places: dict[str, str] = {}
    for text in stores.split(","):
        name, equals, url = text.strip().partition("=")
        if not equals or "/" in name:
            name = url = text.strip()
        if not name or not url or name in places:
            raise typer.BadParameter(f"{stores!r} names an empty store, or one twice", param_hint="--stores")
        places[name] = url
    if len(places) < 2:
        raise typer.BadParameter("name two stores at least, with a comma between them", param_hint="--stores")
    return [each.on_stores(places) if each.of_stores else each for each in wanted]


def settings_of(file: Path) -> list[str]:
    """Read the values of a YAML file as settings, to be laid over others."""
    from trainer.runs.checkpoint import flat

    return [f"{name}={value}" for name, value in flat(read_mapping(file, "--semantic-config ", ConfigError))]


if __name__ == "__main__":
    run_app(app)
