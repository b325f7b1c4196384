"""Command check: compare a model's logits with those of the run that it was exported from."""

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featurestore.console.commandline import CommandApp
from featurestore.console.files import JsonOption, read_tokens, write_json_option
from featurestore.console.output import print_problem, print_summary
from featurestore.errors import FAILED
from featurestore.published.paths import run_path
from serving.commands.bundle import Url

if TYPE_CHECKING:
    from serving.scoring.check import LogitsCompared

app = CommandApp()


@app.command(
    epilog="Examples:\n\n"
    "- `python -m serving check data/models/ctr`\n\n"
    "- `python -m serving check data/models/ctr --samples data/tomorrow --url http://127.0.0.1:8080`"
)
def check(
    model: Url,
    samples: Annotated[
        str | None, typer.Option(help="Samples whose test/ is scored.", show_default="those of the run")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="A running server to ask.", show_default="the model is scored in this process")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(help="Certificates to trust for --url, PEM.", show_default="those of the system")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="File whose first line is the token for the server.")] = None,
    run: Annotated[
        str | None, typer.Option(help="Folder or address of the run.", show_default="where it was exported from")
    ] = None,
    version: Annotated[int | None, typer.Option("--version", min=1, help="By default the one in use.")] = None,
    impressions: Annotated[int, typer.Option(min=1, help="Approximate number of impressions to score.")] = 100_000,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0, help="Largest difference of a logit.", show_default="1e-05; 0.01 where E multiplies in bfloat16"
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Compare a model's logits with its run's on the same impressions; exit 1 if one differs too much.

    The run's engine looks images up in the snapshot that the model's vectors were computed from.
    """
    from serving.bundle.version import ModelVersion
    from serving.errors import ServingError
    from serving.scoring.check import compare
    from serving.scoring.remote import RemoteScorer, ca_context
    from serving.scoring.samples import in_process
    from serving.scoring.scorer import Scorer

    if url is None and (token_file or ca):
        option = "--token-file" if token_file else "--ca"
        raise typer.BadParameter("it needs a running server: give --url", param_hint=option)
    opened = ModelVersion.open(model, version, verify=url is None)
    with contextlib.ExitStack() as stack:
        if url is None:
            scorer = stack.enter_context(contextlib.closing(Scorer.open(model, opened.manifest.version)))
            score, answered = in_process(scorer), f"this process ({scorer.bundle.network.form} network)"
        else:
            remote = RemoteScorer(url, read_tokens(token_file)[0] if token_file else None, ca_context(ca))
            score, answered = remote.score, url
        found = compare(opened, score, run=run_path(run) if run else None, samples=samples, impressions=impressions)
    if url is not None and remote.version != opened.manifest.version:
        raise ServingError(
            f"{url} answers with version {remote.version} of {model} instead of {opened.manifest.version}; give "
            f"--version {remote.version}, or wait until the server has switched"
        )
    print_summary(f"model        {opened.storage.url}, version {opened.manifest.version}, answers by {answered}")
    print_summary(f"run          {run or opened.manifest.run}, {opened.manifest.checkpoint}")
    _print(found)
    write_json_option(json_file, asdict(found))
    if not found.worst <= (allowed := found.tolerance if tolerance is None else tolerance):
        print_problem(f"{found.worst:.3g} is more than --tolerance {allowed:g}")
        raise typer.Exit(FAILED)


def _print(found: "LogitsCompared") -> None:
    print_summary(f"impressions  {found.impressions:,}")
    print_summary(f"logits       differ by {found.worst:.3g} at most ({found.worst_at}), {found.mean:.3g} on average")
    for note in found.notes:
        print_summary(f"note         {note}")
