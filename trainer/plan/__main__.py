"""python -m trainer.plan: what a run would need and how fast it would be on more machines, before you rent them."""

import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.files import JsonOption, write_json_option
from featurestore.console.output import text_console
from featurestore.console.page import PAGE
from trainer.config.config import load_config
from trainer.errors import ConfigError

EXAMPLES = """
Examples:

    python -m trainer.plan --samples data/samples --store data/features --ranks 8,20,40 --global-batch-size 60000

    python -m trainer.plan --ranks 1,2 --ranks-per-machine 2 --samples-per-rank 3000 --config own.yaml --json plan.json

    python -m trainer.plan --paper

The first draws batches from the samples, measures this machine for a minute or two, and computes the rest.
Exit codes: 0 done, 1 failed, 2 wrong settings.
"""

_WITH_PAPER = ("paper", "json_file", PAGE)

app = CommandApp(report=True, rich_markup_mode="markdown")


@app.command(epilog=EXAMPLES)
def main(
    context: typer.Context,
    samples: Annotated[str | None, typer.Option(help="Place of the samples, as data.samples.")] = None,
    store: Annotated[str | None, typer.Option(help="Feature store, as data.store.")] = None,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, with commas.")] = "8,20,40",
    global_batch_size: Annotated[
        int | None, typer.Option(help="Samples of a step over all ranks; default data.global_batch_size.", min=1)
    ] = None,
    samples_per_rank: Annotated[
        int | None, typer.Option(help="Instead: samples of a step of each rank.", min=1)
    ] = None,
    network_gbit: Annotated[float, typer.Option(help="Gbit/s between machines, each way.", min=0)] = 10.0,
    latency_us: Annotated[float, typer.Option(help="Of a message between machines.", min=0)] = 50.0,
    ranks_per_machine: Annotated[int, typer.Option(help="Ranks that share a machine like this one.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda, as run.device.")] = "auto",
    file: Annotated[Path | None, typer.Option("--config", help="YAML file over the trainer's preset.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="One setting; may be repeated.")
    ] = None,
    paper: Annotated[bool, typer.Option("--paper", help="Plan the paper's cluster; measures nothing.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Predict unique images and ids, memory, bytes, time and efficiency for more ranks; recommend a number of ranks."""
    if not math.isfinite(latency_us):
        raise ConfigError(f"--latency-us {latency_us}: give microseconds, as 50")
    if not (math.isfinite(network_gbit) and network_gbit > 0):
        raise ConfigError(f"--network-gbit {network_gbit}: give Gbit/s above zero, as 10")
    if paper:
        _refuse_beside(context)
        from trainer.plan.paper import plan_paper

        plan = plan_paper()
    else:
        if global_batch_size is not None and samples_per_rank is not None:
            raise ConfigError("--global-batch-size and --samples-per-rank exclude each other; give one of them")
        places = {"data.samples": samples, "data.store": store, "run.device": device}
        own = [f"{name}={value}" for name, value in places.items() if value]
        config = load_config(file, [*own, *(settings or [])])
        from trainer.plan.calibrate import PlanQuestion, numbers, plan_own

        question = PlanQuestion(
            ranks=numbers(ranks),
            batch_size=samples_per_rank or global_batch_size or config.data.global_batch_size,
            per_rank=samples_per_rank is not None,
            ranks_per_machine=ranks_per_machine,
            link_bytes_per_s=network_gbit * 1e9 / 8,
            latency_s=latency_us / 1e6,
        )
        plan = plan_own(config, question, lambda text: print(f"{text} ...", file=sys.stderr, flush=True))
    from trainer.plan.table import as_json, show

    show(plan, text_console())
    write_json_option(json_file, as_json(plan))


def _refuse_beside(context: typer.Context) -> None:
    """Raise ConfigError for any other option: --paper measures nothing, and has its own figures."""
    beside = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source and source.name == "COMMANDLINE" and parameter.name not in _WITH_PAPER:
            beside.append(parameter.opts[0])
    if beside:
        raise ConfigError(f"--paper plans the paper's cluster with the paper's figures: leave out {', '.join(beside)}")


if __name__ == "__main__":
    run_app(app)
