"""crossmedia plan: estimate a run's needs and speed on more machines, before you rent them."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from featurestore.console import commandline, files
from trainer.cli import WhichRun, counts_of

EXAMPLES = """Examples:
  crossmedia plan --ranks 2,4,8
  crossmedia plan --run data/runs/short --ranks 8,20,40 --global-batch-size 60000 --json plan.json

Speeds are those of the run, which may be a short one (train.max_steps=50) on one machine; all machines are taken to be
like it, with as many ranks on each. Exit codes: 0 done, 1 failed, 2 wrong settings.
"""

app = commandline.CommandApp(report=True, rich_markup_mode="markdown")


@app.command(epilog=EXAMPLES)
def main(
    run: WhichRun = None,
    ranks: Annotated[Any, typer.Option(parser=counts_of, metavar="N,N", help="Numbers of ranks.")] = "8,20,40",
    global_batch_size: Annotated[
        int | None, typer.Option(help="Samples of a step over all ranks.", min=1, show_default="that of the run")
    ] = None,
    network_gbit: Annotated[float, typer.Option(help="Gbit/s between machines, each way.", min=0.001)] = 10.0,
    json_file: files.JsonOption = None,
) -> None:
    """Predict unique images, memory, bytes, time and efficiency of a run on more ranks; recommend a number of ranks."""
    from trainer.planner import open_planner, show
    from trainer.runs.folder import run_or_newest

    plan = open_planner(run_or_newest(run), global_batch_size, network_gbit * 1e9 / 8).plan(ranks)
    show(plan)
    files.write_json_option(json_file, asdict(plan))


if __name__ == "__main__":
    commandline.run_app(app)
