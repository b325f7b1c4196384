"""crossmedia plan: estimate a run's needs and speed on more machines, before you rent them."""

import sys
from typing import Annotated, Any

import typer

from featurestore.console import commandline, files, output
from trainer.cli import Settings, SettingsFile, counts_of
from trainer.config import load_config

EXAMPLES = """
Examples:

    crossmedia plan --samples data/samples --store data/features --ranks 8,20,40 --global-batch-size 60000

    crossmedia plan --ranks 1,2 --ranks-per-machine 2 --config own.yaml --json plan.json

It draws batches from the samples, measures this machine for a minute or two, and computes the rest.
Exit codes: 0 done, 1 failed, 2 wrong settings.
"""

app = commandline.CommandApp(report=True, rich_markup_mode="markdown")


@app.command(epilog=EXAMPLES)
def main(
    samples: Annotated[str | None, typer.Option(help="Place of the samples, as data.samples.")] = None,
    store: Annotated[str | None, typer.Option(help="Feature store, as data.store.")] = None,
    ranks: Annotated[Any, typer.Option(parser=counts_of, metavar="N,N", help="Numbers of ranks.")] = "8,20,40",
    global_batch_size: Annotated[
        int | None, typer.Option(help="Samples of a step over all ranks; default data.global_batch_size.", min=1)
    ] = None,
    network_gbit: Annotated[float, typer.Option(help="Gbit/s between machines, each way.", min=0.001)] = 10.0,
    latency_us: Annotated[float, typer.Option(help="Of a message between machines.", min=0)] = 50.0,
    ranks_per_machine: Annotated[int, typer.Option(help="Ranks that share a machine like this one.", min=1)] = 1,
    file: SettingsFile = None,
    settings: Settings = None,
    json_file: files.JsonOption = None,
) -> None:
    """Predict unique images and ids, memory, bytes, time and efficiency for more ranks; recommend a number of ranks."""
    places = {"data.samples": samples, "data.store": store}
    own = [f"{name}={value}" for name, value in places.items() if value]
    config = load_config(file, [*own, *(settings or [])])
    from trainer.planner import PlanQuestion, as_json, plan_own, show

    question = PlanQuestion(
        ranks=ranks,
        batch_size=global_batch_size or config.data.global_batch_size,
        ranks_per_machine=ranks_per_machine,
        link_bytes_per_s=network_gbit * 1e9 / 8,
        latency_s=latency_us / 1e6,
    )
    plan = plan_own(config, question, lambda text: print(f"{text} ...", file=sys.stderr, flush=True))
    show(plan, output.text_console())
    files.write_json_option(json_file, as_json(plan))


if __name__ == "__main__":
    commandline.run_app(app)
