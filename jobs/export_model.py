"""Publish a trained run as the next version of a model that crossmedia serve answers requests with."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featurestore.console import commandline, files, output
from serving.bundle import MODELS, SAMPLE_GROUPS
from trainer.cli import StoreVersion, WhichCheckpoint

if TYPE_CHECKING:
    from serving.bundle.export import Exported, ExportOptions
    from serving.bundle.manifest import BundleManifest
    from trainer.gates import GateResult

EXAMPLES = """Examples:
  crossmedia publish
  crossmedia publish --run data/runs/both --out data/models/ctr
  crossmedia publish --run data/runs/daily
  crossmedia publish --run data/runs/both --out s3://shop/models/ctr --compile
  crossmedia publish --run data/runs/both --checkpoint 1000 --no-use

Exit codes: 0 done, 1 failed, 2 wrong options, 3 published but not put in use, as it is worse than the model in use.
"""
REFUSED = 3
"""Exit code of a version that is published, and that the gate does not put in use."""

Gate = Annotated[
    bool,
    typer.Option(
        "--gate/--no-gate",
        help="Put it in use only if GAUC and log loss on the run's evaluation rows are not worse than those of the "
        "model in use, by more than .002 and by more than noise.",
    ),
]
app = commandline.CommandApp(report=True, rich_markup_mode="rich")


@app.command(epilog=EXAMPLES)
def main(
    run: Annotated[
        str | None,
        typer.Option(
            help="Folder or address of a run, or of the runs of crossmedia daily: the newest that is evaluated.",
            show_default="the newest in data/runs",
        ),
    ] = None,
    checkpoint: WhichCheckpoint = None,
    out: Annotated[
        str, typer.Option(help="Folder or s3:// address of the model, which keeps its other versions.")
    ] = MODELS,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the network for this machine as well; it is faster then.")
    ] = False,
    sample_groups: Annotated[
        int,
        typer.Option(
            min=0,
            max=10_000,
            help="Groups of the run's test samples to include, by which a scorer judges the version; 0: none.",
        ),
    ] = SAMPLE_GROUPS,
    store_version: StoreVersion = None,
    use: Annotated[bool, typer.Option("--use/--no-use", help="Serve this version from now on.")] = True,
    gate: Gate = True,
    json_file: files.JsonOption = None,
) -> None:
    """Publish a trained run as the next version of a model that crossmedia serve answers requests with.

    A version has everything for scoring: the network, the ID rows, and the visual vectors of all images of the newest
    snapshot of each feature store. Only the vectors change later: publish_vectors keeps them up to date. Leftovers of
    killed exports are removed after a day. A version that is worse than the one in use, or cannot be compared with it,
    is published but not put in use.
    """
    from serving.bundle.export import ExportOptions
    from trainer.daily import run_of_days
    from trainer.runs.folder import run_or_newest

    start = time.monotonic()
    options = ExportOptions(
        run=run_of_days(run_or_newest(run)),
        checkpoint=checkpoint,
        sample_groups=sample_groups,
        use=use and not gate,
        store_version=store_version,
    )
    exported = _export(out, options, compiled)
    found = put_in_use(out, exported.manifest, options) if use and gate else []
    in_use = use and all(each.holds for each in found)
    _report(exported, out, in_use, time.monotonic() - start, found, json_file)
    if use and not in_use:
        failed = "; ".join(each.text for each in found if not each.holds)
        output.print_problem(f"version {exported.manifest.version} of {out} is not put in use: {failed}")
        raise typer.Exit(REFUSED)


def _export(out: str, options: "ExportOptions", compiled: bool) -> "Exported":
    from functools import partial

    from serving.bundle.export import export_model, write_network

    network = partial(write_network, compiled=compiled)
    with output.progress_bar("shards") as progress:
        return export_model(out, options, network=network, progress=progress)


def _report(
    exported: "Exported", out: str, in_use: bool, seconds: float, gates: Sequence["GateResult"], json_file: Path | None
) -> None:
    output.print_summary(summary_text(exported, out, in_use, seconds, gates))
    found = [asdict(each) for each in gates]
    figures = {"in_use": in_use, "gates": found, "seconds": seconds}
    files.write_json_option(json_file, {**exported.manifest.model_dump(mode="json"), **figures})


def put_in_use(out: str, new: "BundleManifest", options: "ExportOptions") -> list["GateResult"]:
    """Put a published version in use if it is as good as the one in use; return the gate's result, if any.

    Raises ServingError, FeatureStoreError.
    """
    from featurestore.published.paths import run_path
    from featurestore.storage.storage import Storage
    from serving.bundle import log
    from trainer.gates import gate_model
    from trainer.runs.saved import RunSource

    storage = Storage(out)
    found: list[GateResult] = []
    if log.version_in_use(storage) is not None:
        old = log.read_version(storage)
        in_use = RunSource(run_path(old.run), old.checkpoint)
        version = options.store_version
        found = gate_model(options.run, new.checkpoint, in_use, old.checkpoint_digest, store_version=version)
    if all(each.holds for each in found):
        log.use(storage, new.version)
    return found


def summary_text(
    exported: "Exported", out: str, in_use: bool, seconds: float, gates: Sequence["GateResult"] = ()
) -> str:
    """Write the lines that the job prints."""
    manifest = exported.manifest
    rows = sum(each.num_rows for each in manifest.rows)
    names = {each.name for each in manifest.rows}
    rows_bytes = sum(file.bytes for file in manifest.files if file.name in names)
    lines = [
        f"run          {manifest.run}, {manifest.checkpoint}",
        f"id rows      {rows:,} in {len(manifest.tables)} tables, {rows_bytes:,} bytes",
    ]
    lines += [
        f"vectors      {of.store}: {exported.num_images[of.store]:,} images of snapshot "
        f"{of.source.version} of {of.source.url}, {len(of.no_image)} numbers each"
        for of in manifest.vectors
    ]
    compiled = [file.name for file in manifest.files if file.name.startswith("network-")]
    lines += [f"compiled     {name}" for name in compiled]
    lines += [f"note         {note}" for note in exported.notes]
    lines += [f"gate         {'' if each.holds else 'fails: '}{each.text}" for each in gates]
    return "\n".join(
        [
            *lines,
            f"time         {seconds:.1f} s",
            f"published    version {manifest.version} of {out}, {'in use' if in_use else 'not in use yet'}",
            f"next         crossmedia serve {shlex.quote(out)}"
            if in_use
            else f"next         crossmedia model use {shlex.quote(out)} {manifest.version}",
        ]
    )


if __name__ == "__main__":
    commandline.run_app(app)
