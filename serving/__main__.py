"""python -m serving: answer requests with a published model, and manage its versions."""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal as bytes_text

from featurestore.console.commandline import CommandApp, run_app, takes
from featurestore.console.files import JsonOption, read_tokens, write_json_option
from featurestore.console.output import figure, print_problem, print_rows, print_summary
from featurestore.errors import FAILED
from featurestore.published.paths import run_path
from featurestore.storage.storage import Storage
from featurestore.text import count_text, ranges_text
from serving.bundle import GRACE_DAYS, KEEP_DAYS, KEEP_LAST
from serving.problems import Problem
from serving.settings import ServerSettings

if TYPE_CHECKING:
    from serving.bundle.files import Vectors

app = CommandApp(
    help="Answer requests with a published model, and manage its versions.",
    epilog="Examples:\n\n- `crossmedia serve data/models/ctr --port 8080`\n\n- `crossmedia model log data/models/ctr`",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MISSING = {
    "zeros": "count as zeros",
    "learned": "count as the vector that training has learned for them",
    "error": "count as zeros; training has met none, as it would have stopped",
}
"""Texts for the policies for images without a feature."""

Url = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or s3:// address of the published model.")]


@app.command(
    epilog="Examples:\n\n"
    "- `crossmedia serve data/models/ctr --port 8080`\n\n"
    "- `crossmedia serve s3://shop/models/ctr --host 0.0.0.0 --workers 4 --tls-cert tls.crt --tls-key tls.key "
    "--token-file tokens.txt`"
)
@takes(ServerSettings)
def serve(settings: ServerSettings) -> None:
    """Answer requests over HTTP: /v1/score, the Open Inference Protocol, and /metrics.

    The server loads a version that is put in use, or newer vectors, while the old ones answer, and switches without
    failing a request. On SIGTERM it finishes running requests first; a second signal ends it at once.
    """
    from serving.bundle.log import read_version

    read_version(Storage(settings.model))  # reports a wrong folder before Torch is loaded and the port is taken
    from serving.http.workers import serve as listen_and_answer

    raise typer.Exit(listen_and_answer(settings))


@app.command(
    epilog="Examples:\n\n- `crossmedia model info data/models/ctr`\n\n"
    "- `crossmedia model info s3://shop/models/ctr --version 3`"
)
def info(
    url: Url,
    version: Annotated[int | None, typer.Option("--version", min=1, help="By default the one in use.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Show the contents of a version: its run, its ID rows, and the snapshots of its vectors.

    Exit code 1 if one of its files is missing or has another size.
    """
    from featurestore.log import utc_text
    from serving.bundle.files import find_damage, newest_vectors
    from serving.bundle.log import read_version, version_in_use

    storage = Storage(url)
    manifest = read_version(storage, version)
    in_use = version_in_use(storage) == manifest.version
    damage = find_damage(storage, manifest)
    vectors = newest_vectors(storage, manifest)
    rows_bytes = sum(file.bytes for file in manifest.files if file.name in {each.name for each in manifest.rows})
    lines = {
        "model": storage.url,
        "version": f"{manifest.version} ({'in use' if in_use else 'not in use'})",
        "published": f"{utc_text(manifest.time_s)} by {manifest.writer}",
        "run": f"{manifest.run}, {manifest.checkpoint} ({manifest.checkpoint_digest[:12]})",
        "files": f"{len(manifest.files)}, {sum(file.bytes for file in manifest.files):,} bytes",
        "id rows": f"{sum(each.num_rows for each in manifest.rows):,}, {rows_bytes:,} bytes",
        **{f"table {each.name}": f"{each.kind}, {each.num_rows:,} rows of {each.width}" for each in manifest.tables},
        **{f"vectors of {name}": _vectors_text(each) for name, each in vectors.items()},
        "missing images": _MISSING[manifest.missing_in_training],
        **{f"test {name.replace('_', ' ')}": figure(value) for name, value in manifest.metrics.items()},
    }
    width = max(24, *map(len, lines))
    for name, value in [*lines.items(), *(("damage", each) for each in damage)]:
        print_summary(f"{name:<{width}} {value}")
    now = {
        name: each
        and {
            "snapshot": each.snapshot.version,
            "images": each.snapshot.num_rows,
            "source": each.source.model_dump(mode="json"),
        }
        for name, each in vectors.items()
    }
    values = {**manifest.model_dump(mode="json"), "in_use": in_use, "vectors_now": now, "damage": damage}
    write_json_option(json_file, values)
    if damage:
        raise typer.Exit(FAILED)


@app.command(epilog="Example: `crossmedia model log data/models/ctr --last 20`")
def log(
    url: Url,
    last: Annotated[int | None, typer.Option("--last", "-n", min=1, help="How many to list; all by default.")] = None,
    json_file: JsonOption = None,
) -> None:
    """List the published versions, newest first, with the time when each was last put in use."""
    from featurestore.log import utc_text
    from serving.bundle.log import choices, list_versions, version_in_use

    storage = Storage(url)
    found, rows = list_versions(storage, last), list[Sequence[str]]()
    for each in found:
        about = ["damaged", "", "", ""]
        if (manifest := each.manifest) is not None:
            size = bytes_text(sum(file.bytes for file in manifest.files))
            about = [utc_text(manifest.time_s), manifest.run, manifest.checkpoint, size]
        since = f"{'since' if each.in_use else 'was,'} {utc_text(each.chosen_s[-1])}" if each.chosen_s else ""
        rows.append((f"{each.version}", *about, since))
    print_rows(("version", "published", "run", "checkpoint", "bytes", "in use"), rows, numbers=("version", "bytes"))
    write_json_option(
        json_file,
        {
            "in_use": version_in_use(storage),
            "versions": [each.manifest.model_dump(mode="json") for each in found if each.manifest],
            "damaged": [each.version for each in found if not each.manifest],
            "choices": [each.model_dump(mode="json") for each in choices(storage)],
        },
    )


@app.command(epilog="Example: `crossmedia model use data/models/ctr 3`")
def use(
    url: Url,
    version: Annotated[int, typer.Argument(metavar="VERSION", min=1, help="A published version.")],
) -> None:
    """Put a version in use, also an earlier one. Running scorers switch to it.

    Its files are first read and compared with their digests, and the version is opened as a scorer does, which copies
    it to this machine from an object store. A version that is damaged or cannot be opened is refused, and the previous
    one stays in use."""
    from serving.bundle.files import find_damage
    from serving.bundle.log import read_version, version_in_use
    from serving.bundle.log import use as use_version
    from serving.errors import BrokenBundleError

    storage = Storage(url)
    before = version_in_use(storage)
    stays = f"; version {before} stays in use" if before is not None else ""
    try:
        damage = find_damage(storage, read_version(storage, version)) or _problem_of_opening(storage.url, version)
    except BrokenBundleError as error:
        damage = [str(error)]
    if damage:
        raise BrokenBundleError(Problem.VERSION_DAMAGED, version, storage.url, stays, "\n".join(damage))
    use_version(storage, version)
    instead = f" instead of version {before}" if before not in (None, version) else ""
    print_summary(f"version {version} of {storage.url} is in use{instead}")


def _problem_of_opening(url: str, version: int) -> list[str]:
    """Return in one line why a version cannot be opened and read, or an empty list. Raises StorageError."""
    from featurestore.errors import StorageError, UserError
    from featurestore.text import one_line
    from serving.scoring.scorer import Scorer

    try:
        with contextlib.closing(Scorer.open(url, version)) as scorer:
            for file in scorer.manifest.files:
                scorer.files.path(file.name)
    except StorageError:
        raise
    except UserError as error:
        return [str(error)]
    except Exception as error:  # numpy and torch raise many kinds of errors for a forged manifest
        return [f"it cannot be opened: {type(error).__name__}: {one_line(error)}"]
    return []


def _vectors_text(found: "Vectors | None") -> str:
    if found is None:
        return "damaged"
    snapshot, source = found
    return (
        f"snapshot {snapshot.version}: {snapshot.num_rows:,} images of snapshot {source.version} of {source.url}, "
        f"{snapshot.manifest.file_bytes:,} bytes"
    )


@app.command(
    epilog="Examples:\n\n"
    "- `crossmedia model expire data/models/ctr --dry-run`\n\n"
    "- `crossmedia model expire s3://shop/models/ctr --keep-last 3 --keep-days 7`"
)
def expire(
    url: Url,
    keep_last: Annotated[
        int, typer.Option("--keep-last", min=0, help="How many of the last versions to keep.")
    ] = KEEP_LAST,
    keep_days: Annotated[
        float, typer.Option("--keep-days", min=0, help="Keep versions that were published or in use in the last days.")
    ] = KEEP_DAYS,
    grace_days: Annotated[
        float, typer.Option("--grace-days", min=0, help="Always keep versions that were in use in the last days.")
    ] = GRACE_DAYS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and change nothing.")] = False,
) -> None:
    """Remove versions that none of these options keeps, with all of their files.

    The version in use and the newest one always stay. Leftovers of killed exports are removed after a day. The grace
    time must be longer than a scorer takes to switch. To remove snapshots of vectors, use `crossmedia store
    expire`."""
    from serving.bundle.log import expire as expire_model

    storage = Storage(url)
    report = expire_model(storage, keep_last=keep_last, keep_days=keep_days, grace_days=grace_days, dry_run=dry_run)
    keep, remove, delete = ("would keep", "would remove", "would delete") if dry_run else ("kept", "removed", "deleted")
    expired = f": {ranges_text(report.expired)}" if report.expired else ""
    left = f", leftovers of {count_text(report.num_leftovers, 'killed export')}" if report.num_leftovers else ""
    print_summary(
        f"{keep} {count_text(len(report.kept), 'version')}: {ranges_text(report.kept)}\n"
        f"{remove} {count_text(len(report.expired), 'version')}{expired}\n"
        f"{delete} {bytes_text(report.num_bytes)}{left}" + "".join(f"\n  {folder}" for folder in report.folders)
    )


@app.command(
    epilog="Examples:\n\n"
    "- `crossmedia model check data/models/ctr`\n\n"
    "- `crossmedia model check data/models/ctr --samples data/tomorrow --url http://127.0.0.1:8080`"
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
    from serving.bundle.open import ModelVersion
    from serving.errors import ServingError
    from serving.scoring.samples import RemoteScorer, ca_context, compare, in_process
    from serving.scoring.scorer import Scorer

    if url is None and (token_file or ca):
        option = "--token-file" if token_file else "--ca"
        raise typer.BadParameter(Problem.NEEDS_SERVER.of(), param_hint=option)
    opened = ModelVersion.open(model, version)
    with contextlib.ExitStack() as stack:
        if url is None:
            scorer = stack.enter_context(contextlib.closing(Scorer.open(model, opened.manifest.version)))
            score, answered = in_process(scorer), f"this process ({scorer.network.form} network)"
        else:
            remote = RemoteScorer(url, read_tokens(token_file)[0] if token_file else None, ca_context(ca))
            score, answered = remote.score, url
        found = compare(opened, score, run=run_path(run) if run else None, samples=samples, impressions=impressions)
    if url is not None and remote.version != opened.manifest.version:
        raise ServingError(Problem.OTHER_VERSION_ANSWERS, url, remote.version, model, opened.manifest.version)
    print_summary(f"model        {opened.storage.url}, version {opened.manifest.version}, answers by {answered}")
    print_summary(f"run          {run or opened.manifest.run}, {opened.manifest.checkpoint}")
    print_summary(f"impressions  {found.impressions:,}")
    logits = f"logits       differ by {found.worst:.3g} at most, {found.mean:.3g} on average"
    print_summary("\n".join([logits, *(f"note         {note}" for note in found.notes)]))
    write_json_option(json_file, asdict(found))
    if not found.worst <= (allowed := found.tolerance if tolerance is None else tolerance):
        print_problem(Problem.TOO_FAR.of(found.worst, allowed))
        raise typer.Exit(FAILED)


def main() -> None:
    """Run `python -m serving`."""
    run_app(app, "python -m serving")


if __name__ == "__main__":
    main()
