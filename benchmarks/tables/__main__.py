"""Train the variants of tables over some seeds, and say which differences are more than noise.

    python -m benchmarks.tables benchmarks/tables/paper.yaml --seeds 5 --json data/bench/paper.json

What is found is what is written: no order of the variants is assumed.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.report import JsonPath, write_sections
from featurestore.console.commandline import CommandApp, run_app
from trainer.config import Config, load_config
from trainer.main import on_ranks

if TYPE_CHECKING:
    from trainer.comm import Comm

EXAMPLES = """Examples:
  python -m benchmarks.tables benchmarks/tables/paper.yaml --table images --table prerank --config my.yaml
  horovodrun -np 2 python -m benchmarks.tables benchmarks/tables/beyond.yaml --table stores

A run is found again by its settings, samples and stores' snapshots: an interrupted call continues from the last
checkpoint of the run that it was in (train.checkpoint_every), and tables share the runs that they have in common.
"""

app = CommandApp(report=True, on_ranks=True, rich_markup_mode="markdown")


@app.command(epilog=EXAMPLES)
def main(
    file: Annotated[Path, typer.Argument(help="YAML file with the tables, as benchmarks/tables/paper.yaml.")],
    json_path: JsonPath = None,
    names: Annotated[list[str] | None, typer.Option("--table", help="Tables of it; repeat it. Default: all.")] = None,
    seeds: Annotated[
        int, typer.Option(min=1, max=10_000, help="Runs of each variant; 5 show a difference of one deviation.")
    ] = 5,
    config_file: Annotated[Path | None, typer.Option("--config", help="YAML file over the defaults.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="One setting of all runs.")
    ] = None,
    folder: Annotated[Path, typer.Option("--dir", help="Of the runs, which are kept.")] = Path("data/bench/tables"),
) -> None:
    """Train every variant over some seeds, and say which differences are more than noise."""

    def work(_: Config, comm: "Comm") -> None:
        from benchmarks.tables.runs import Runner, make_sections
        from benchmarks.tables.variants import load_tables

        runner = Runner(folder, config_file, tuple(settings or ()), comm)
        sections = make_sections(load_tables(file, names or ()), range(seeds), runner, comm)
        comm.on_rank_0(lambda: write_sections(sections, json_path))

    raise typer.Exit(on_ranks(lambda: load_config(config_file, settings or ()), work))


if __name__ == "__main__":
    run_app(app)
