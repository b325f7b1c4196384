"""What python -m trainer.plan predicts for ranks of this machine, compared with a run under horovodrun.

    python -m benchmarks.plan [--dir DIR] [--json FILE] [--ranks 1,2,4]

On the paper-shaped workload, small. Ranks beyond the number of cores take turns on them, in the plan as in the run. The
measured time is the mean of two runs for each number of ranks, one from either end of the row.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.report import Figure, JsonPath, write_report
from benchmarks.workload import Knobs, Workload, make
from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import progress_bars
from trainer.cli import counts_of
from trainer.config.config import load_config
from trainer.errors import PlanError

if TYPE_CHECKING:
    from trainer.plan.table import RankPlan

STEPS = 12
_LOOPBACK_BYTES_PER_S = 1e9  # not used: all ranks are on this machine

app = CommandApp(report=True, failures=(OSError,))


@app.command()
def main(
    folder: Annotated[Path, typer.Option("--dir", help="Where the workload is, or is made.")] = Path("data/bench/plan"),
    json_file: JsonPath = None,
    ranks: Annotated[Any, typer.Option(parser=counts_of, metavar="N,N", help="Numbers of ranks.")] = "1,2,4",
    images: Annotated[int, typer.Option(help="In the store.", min=100)] = 20_000,
    samples_per_rank: Annotated[int, typer.Option(help="Of a step.", min=16)] = 1_500,
) -> None:
    """Compare predicted with measured steps; prints the figures."""
    with progress_bars() as progress:
        knobs = Knobs(images=images, samples_per_rank=samples_per_rank, steps=24, test_samples=600)
        workload = make(folder, knobs, progress)
    figures = compare(workload, ranks)
    write_report(figures, json_file)


def compare(workload: Workload, ranks: tuple[int, ...]) -> dict[str, Figure]:
    """Compare predicted and measured figures of each number of ranks; the time's largest error is `worst_error`."""
    from trainer.plan.calibrate import PlanQuestion, plan_own

    config = load_config(workload.config)
    question = PlanQuestion(
        ranks=ranks,
        batch_size=workload.knobs.samples_per_rank,
        per_rank=True,
        ranks_per_machine=max(ranks),
        link_bytes_per_s=_LOOPBACK_BYTES_PER_S,
        latency_s=0.0,
    )
    plan = plan_own(config, question, lambda text: typer.echo(f"{text} ...", err=True))
    figures: dict[str, Figure] = {}
    reports: dict[int, list[dict[str, Any]]] = {count: [] for count in ranks}
    for count in [*ranks, *reversed(ranks)]:
        typer.echo(f"training with {count} ranks ...", err=True)
        reports[count].append(run(workload, count))
    for row in plan.rows:
        figures |= _compared(row, reports[row.ranks])
    errors = [abs(float(value or 0) - 1) for name, value in figures.items() if name.startswith("step_predicted_over")]
    return {**figures, "worst_error": max(errors)}


def run(workload: Workload, ranks: int) -> dict[str, Any]:
    """Run a few steps of the trainer on `ranks` ranks of this machine; return their report. Raises PlanError."""
    with tempfile.TemporaryDirectory(prefix="plan-runs-") as runs:
        changes = {"run.dir": runs, "run.name": "run", "train.max_steps": STEPS, "train.epochs": STEPS}
        settings = [f"{name}={value}" for name, value in changes.items()] + workload.settings(ranks)
        trainer = [sys.executable, "-m", "trainer.main", "--config", str(workload.config), *settings]
        launcher = [str(Path(sys.executable).with_name("horovodrun")), "-np", str(ranks)]
        done = subprocess.run([*launcher, *trainer], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise PlanError(f"the trainer failed on {ranks} ranks:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        report: dict[str, Any] = json.loads((Path(runs) / "run" / "report.json").read_text())
    return report


def _compared(row: "RankPlan", reports: list[dict[str, Any]]) -> dict[str, Figure]:
    cost = row.cost
    report, step_s = reports[0], statistics.mean(row.counts.samples / each["samples_per_s"] for each in reports)
    sent = cost.bytes_sent * row.ranks
    at = f"at_{row.ranks}"
    return {
        f"step_predicted_s_{at}": cost.seconds,
        f"step_measured_s_{at}": step_s,
        f"step_predicted_over_measured_{at}": cost.seconds / step_s,
        f"images_predicted_over_measured_{at}": row.counts.images.unique / report["images_per_step"],
        f"bytes_predicted_over_measured_{at}": sent / report["bytes_sent_per_step"] if row.ranks > 1 else None,
        f"owner_skew_predicted_{at}": row.counts.images.skew(row.ranks),
        f"owner_skew_measured_{at}": report["owner_skew"],
    }


if __name__ == "__main__":
    run_app(app)
