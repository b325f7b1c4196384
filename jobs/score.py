"""Score test impressions with a trained run or a published model, one row each, as a Parquet file."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from featurestore.console import commandline, files, output
from featurestore.text import count_text
from pipeline.problems import Problem
from trainer.cli import WhichCheckpoint, WhichRun, run_on_ranks

if TYPE_CHECKING:
    from trainer.comm import Comm
    from trainer.evaluation.predict import Written

EXAMPLES = """Examples:
  crossmedia score
  crossmedia score --run data/runs/both --samples data/tomorrow --out s3://shop/scores.parquet
  horovodrun -np 4 crossmedia score --run data/runs/both
  crossmedia score --model data/models/ctr --samples data/tomorrow

Exit codes: 0 done, 1 failed, 2 wrong options.
"""

app = commandline.CommandApp(report=True, on_ranks=True, rich_markup_mode="rich")


@app.command(epilog=EXAMPLES)
def main(
    run: WhichRun = None,
    checkpoint: WhichCheckpoint = None,
    samples: Annotated[
        str | None, typer.Option(help="Other samples: their test/ is scored.", show_default="those of the run")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="New address of the run's store; its newest snapshot is used.",
            show_default="the snapshot that it was trained on",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A published model instead of a run; by default its version in use.")
    ] = None,
    version: Annotated[
        int | None, typer.Option("--version", min=1, help="Version of the model.", show_default="the one in use")
    ] = None,
    out: Annotated[str, typer.Option(help="File to write, or replace: NAME.parquet.")] = "data/scores.parquet",
) -> None:
    """Score test impressions with a trained run, or a published model: a Parquet file with a row for each.

    It has the columns user, ad, time, label, logit and probability, and the position of the impression in the samples:
    file, row (the sample group in the file) and place (the impression in the group), from 0. On several ranks
    (horovodrun) each rank scores a part: the file has the same rows, and logits differ in the last digits, by up to
    about 0.001 if E computes in bfloat16.
    """
    files.check_ending(out, "--out", ".parquet")
    _check_options(model, samples, version, {"--run": run, "--checkpoint": checkpoint, "--store": store})
    start = time.monotonic()

    def work(comm: "Comm") -> None:
        # Torch takes seconds to load: not for --help.
        from trainer.errors import ConfigError
        from trainer.evaluation.predict import score_run
        from trainer.runs.folder import run_or_newest
        from trainer.runs.saved import RunSource

        if model is not None and samples is not None:
            if comm.size > 1:
                raise ConfigError(Problem.SEVERAL_RANKS, model, comm.size)
            from serving.scoring.samples import score_model

            written: Written | None = score_model(model, samples, out, version)
        else:
            source = comm.on_rank_0(lambda: RunSource(run_or_newest(run), checkpoint, samples, store))
            written = score_run(source, out, comm)
        if written:
            output.print_summary("\n".join(summary_text(written, comm.size, out, time.monotonic() - start)))

    raise typer.Exit(run_on_ranks(work))


def _check_options(model: str | None, samples: str | None, version: int | None, of_run: dict[str, object]) -> None:
    """Raise BadParameter for options that do not go together."""
    if model is None:
        if version is not None:
            raise typer.BadParameter(Problem.NEEDS_MODEL.of(), param_hint="--version")
        return
    if given := [name for name, value in of_run.items() if value is not None]:
        raise typer.BadParameter(Problem.ONLY_OF_RUN.of(model), param_hint=given[0])
    if samples is None:
        raise typer.BadParameter(Problem.NEEDS_SAMPLES.of(), param_hint="--samples")


def summary_text(written: "Written", num_ranks: int, out: str, seconds: float) -> list[str]:
    """Write the lines that the job prints."""
    about = written.about
    model = [f"model        {about['model']}, version {about['version']}"] if "model" in about else []
    return [
        *model,
        f"run          {about['run']}, {about['checkpoint']}",
        f"samples      {about['samples']}, {written.impressions:,} impressions",
        f"scores       mean {written.mean_probability:.4f}; {written.mean_label:.4f} of the labels are 1",
        *(f"note         {note}" for note in written.notes),
        f"time         {seconds:.1f} s on {count_text(num_ranks, 'rank')}",
        f"written to   {out}",
    ]


if __name__ == "__main__":
    commandline.run_app(app)
