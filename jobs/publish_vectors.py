"""Update the visual vectors of a published model to the newest images of its feature stores."""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurestore.console import commandline, files, output
from pipeline.problems import Problem
from serving.bundle import MODELS
from trainer.cli import StoreVersion

if TYPE_CHECKING:
    from featurestore.published.versions import VersionName
    from serving.bundle.images import PublishReport
    from serving.bundle.manifest import VectorsOf
    from serving.bundle.open import ModelVersion

EXAMPLES = """Examples:
  crossmedia publish-vectors
  crossmedia publish-vectors --model s3://shop/models/ctr
  crossmedia publish-vectors --model data/models/ctr --store s3://shop/features
  crossmedia publish-vectors --model data/models/ctr --store images=s3://shop/features --store titles=data/titles
  crossmedia publish-vectors --model data/models/ctr --store-version stable

Exit codes: 0 done, also where there was nothing to do, 1 failed, 2 wrong options.
"""

app = commandline.CommandApp(report=True, rich_markup_mode="rich")


@app.command(epilog=EXAMPLES)
def main(
    model: Annotated[str, typer.Option(help="Folder or s3:// address of the published model.")] = MODELS,
    version: Annotated[
        int | None, typer.Option(min=1, help="Version of the model.", show_default="the one in use")
    ] = None,
    store: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]URL",
            help="Current address of a feature store; repeat for more.",
            show_default="where it was at the export",
        ),
    ] = None,
    store_version: StoreVersion = None,
    json_file: files.JsonOption = None,
) -> None:
    """Update the visual vectors of a published model to the newest images of its feature stores.

    Processes only images that are new, changed or removed since the last time. Their vectors become one commit, which
    running scorers load by themselves. A second run changes nothing.
    """
    from serving.bundle.open import ModelVersion

    opened = ModelVersion.open(model, version)
    places = store_places(store or [], [of.store for of in opened.manifest.vectors])
    figures: list[dict[str, Any]] = []
    start = time.monotonic()
    if not opened.manifest.vectors:
        output.print_summary("vectors      none: the model sees no images, there is nothing to do")
    for of in opened.manifest.vectors:
        began = time.monotonic()
        chosen = store_version if of is opened.manifest.vectors[0] else None
        report = _published(opened, of, places.get(of.store), chosen)
        figures.append({**asdict(report), "seconds": time.monotonic() - began})
    output.print_summary(f"time         {time.monotonic() - start:.1f} s")
    files.write_json_option(json_file, {"version": opened.manifest.version, "stores": figures})


def _published(
    opened: "ModelVersion", of: "VectorsOf", source: str | None, version: "VersionName | None"
) -> "PublishReport":
    """Bring the vectors of one feature store up to its snapshot `version`, and print a summary."""
    from featurestore.store import FeatureStore
    from featurestore.upkeep.compaction import MAX_DELTAS
    from serving.bundle.images import network_for, publish

    url = opened.vectors_url(of)
    with output.progress_bar("shards") as progress:
        report = publish(
            FeatureStore.open(url),
            of,
            network_for(opened, of),
            source_url=source,
            source_version=version,
            progress=progress,
        )
    output.print_summary(summary_text(report))
    if report.most_files > 1 + MAX_DELTAS:
        output.print_summary(f"next         crossmedia store compact {url}")
    return report


def summary_text(report: "PublishReport") -> str:
    """Format the summary of one feature store."""
    since = f"since snapshot {report.mirrored}" if report.mirrored is not None else "all of them looked at"
    head = f"vectors      {report.store}: of snapshot {report.source} of the features"
    if not report.committed:
        return f"{head} already, nothing to do"
    rows = report.added + report.changed + report.removed
    return "\n".join(
        [
            head,
            f"images       {since}: {report.added:,} new, {report.changed:,} changed, {report.removed:,} gone"
            + (f", {report.stayed:,} are the same" if report.stayed else ""),
            f"published    {rows:,} rows, {report.num_bytes:,} bytes, as snapshot {report.snapshot} of the vectors",
        ]
    )


def store_places(given: list[str], names: list[str]) -> dict[str, str]:
    """Read the options --store: the place of each named store. An address alone is of the only one.

    Raises BadParameter where a name is none of `names`, or has to be given.
    """
    places: dict[str, str] = {}
    for each in given:
        name, _, url = each.partition("=")
        if name not in names:
            if len(names) != 1 or ("/" not in name and url):
                raise typer.BadParameter(
                    Problem.NO_SUCH_STORE.of(each, ", ".join(names) or "no store"), param_hint="--store"
                )
            name, url = names[0], each
        places[name] = url
    return places


if __name__ == "__main__":
    commandline.run_app(app)
