"""The whole chain on drawn clothes or your own photographs: data, features, samples, trainings, a table, a scorer.

Every step is a command that a user could type; it is printed before it runs. A second call keeps the images and their
features, and makes the samples and the trainings again.
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from crossmedia.demo_serving import (
    NUM_CANDIDATES,
    draw_new_picture,
    latencies_ms,
    request_of,
    running_scorer,
    wait_for_picture,
)
from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.files import write_json
from featurestore.console.output import print_table, text_console
from featurestore.keys import key_of_uri

CROSSMEDIA = [sys.executable, "-m", "crossmedia"]
ON_DASK = ["-n", "1"]
VARIANTS = {"none": "IDs only", "ad": "+ ad image", "behavior": "+ behaviour images", "both": "+ both"}
METRICS = {"auc": "AUC", "gauc": "GAUC", "new_ad_auc": "AUC, new ads", "logloss": "log loss"}
ITEMS = 1000
"""Clothes that are drawn, fewer than `crossmedia demo-data` draws: each takes the network a tenth of a second."""
PAGES = 150
"""Files of the exported pages at most."""
EXAMPLES = """Examples:
  crossmedia demo
  crossmedia demo --small --dir /tmp/demo
  crossmedia demo --images ~/photos --labels ~/photos.csv --dir data/demo-photos
"""

console = text_console()


def run_step(title: str, command: Sequence[str | Path]) -> None:
    """Run one command, showing its output; end the demo with the command's exit code if it fails."""
    words = [str(word) for word in command]
    console.print(f"\n{title}", style="bold")
    console.print(f"$ {shlex.join(words)}", style="cyan")
    started = time.monotonic()
    code = subprocess.run(words, check=False).returncode
    if code != 0:
        console.print(f"{title}: the command above ended with exit code {code}", style="red")
        raise typer.Exit(code)
    console.print(f"({time.monotonic() - started:.0f} s)", style="dim")


def make_features(place: Path, seed: int, small: bool, force: bool, images: Path | None, labels: Path | None) -> None:
    """Make the demo data and the feature store under `place`."""
    data: list[str | Path] = ["demo-data", "--out", place, "--seed", str(seed)]
    data += ["--small"] if small else [] if images else ["--items", str(ITEMS)]
    data += ["--force"] if force else []
    data += ["--images", images] if images else []
    data += ["--labels", labels] if labels else []
    run_step("Demo data", [*CROSSMEDIA, *data])
    if force:  # features of other images, or of another network, do not mix with these
        shutil.rmtree(place / "features", ignore_errors=True)
    extract: list[str | Path] = ["--images", images or place / "images", "--store", place / "features"]
    extract += ["--weights", f"random:{seed}"]
    run_step("Features: frozen VGG16 once per image", [*CROSSMEDIA, "extract", *ON_DASK, *extract])


def make_samples(place: Path) -> None:
    """Build the samples under `place`."""
    samples: list[str | Path] = ["--logs", place / "logs", "--samples", place / "samples"]
    run_step("Samples: image keys only", [*CROSSMEDIA, "samples", *ON_DASK, *samples])


def train(place: Path, variant: str, seed: int, ranks: int) -> dict[str, Any]:
    """Train one variant from scratch on several ranks, of horovodrun where there is one, and return its report."""
    settings = {
        "data.samples": place / "samples",
        "data.store": place / "features",
        "run.dir": place / "runs",
        "run.name": variant,
        "run.overwrite": "true",
        "train.seed": seed,
        "model.images": variant,
    }
    overrides = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    from trainer.comm.comm import launcher_of

    trainer = [*launcher_of(ranks), "-m", "crossmedia", "train", *overrides]
    run_step(f"Training: {VARIANTS[variant]}", trainer)
    report: dict[str, Any] = json.loads((place / "runs" / variant / "report.json").read_text())
    return report


def serve(place: Path, images: Path | None) -> dict[str, float]:
    """Publish the run with both images, score it over HTTP, and give a new picture a score without a restart.

    The picture is drawn into the folder of drawn images, or, if the user gave `images`, into a folder next to them.
    """
    model, store = place / "models/ctr", place / "features"
    pictures = place / ("new-images" if images else "images")
    shutil.rmtree(model, ignore_errors=True)  # of an earlier demo: its run has been replaced, and compares with nothing
    publish: list[str | Path] = ["publish", "--run", place / "runs/both", "--out", model]
    run_step("The model as a bundle: network, ID rows, 12 numbers per image", [*CROSSMEDIA, *publish])
    console.print("\nScorer", style="bold")
    with running_scorer(model, lambda line: console.print(line, style="cyan")) as scorer:
        request = request_of(place / "samples")
        figures = latencies_ms(scorer, request)
        name = draw_new_picture(pictures)
        request["candidates"]["ad_image"][0] = key_of_uri(name)
        before = scorer.score(request)
        refresh: list[str | Path] = ["--images", pictures, "--store", store, "--keep-missing"]
        run_step("A new picture: its features", [*CROSSMEDIA, "refresh", *ON_DASK, *refresh])
        run_step("A new picture: its 12 numbers", [*CROSSMEDIA, "publish-vectors", "--model", model])
        figures["new_picture_score"] = wait_for_picture(scorer, request)
    console.print(
        f"\nthe score of an ad with the new picture {name}: {before['scores'][0]:.4f} while the picture was unknown, "
        f"{figures['new_picture_score']:.4f} now, from the same scorer, without a restart\n"
        f"{NUM_CANDIDATES} candidates over HTTP: median {figures['p50_ms']:.1f} ms, p99 {figures['p99_ms']:.1f} ms"
    )
    return figures


def show_pages(place: Path, images: Path | None) -> list[str | Path]:
    """Write the explorer's pages into a folder, and return the command that serves them."""
    places: list[str | Path] = ["--store", place / "features", "--runs", place / "runs", "--samples", place / "samples"]
    places += ["--images", images or place / "images"]
    export = [*CROSSMEDIA, "explore", "export", place / "pages", *places, "--most-files", str(PAGES)]
    run_step("Pages: the store, its images, the runs and their scores, as files", export)
    return ["crossmedia", "explore", *places, "--model", place / "models/ctr"]


def summarise(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the report: the metrics of each variant, and the exchange's figures of the run with both images."""
    summary: dict[str, Any] = {
        variant: {metric: report["metrics"][metric] for metric in METRICS} for variant, report in reports.items()
    }
    figures = ("unique_ratio", "bytes_sent_per_step", "samples_per_s")
    return summary | {figure: reports["both"][figure] for figure in figures}


def show(summary: dict[str, Any]) -> None:
    """Print the table, the gain over IDs only next to each figure."""
    table = Table(title="Test day: the same IDs in all four rows, image ids among them")
    table.add_column("model")
    for title in METRICS.values():
        table.add_column(title, justify="right")
    for variant, title in VARIANTS.items():
        cells = []
        for metric in METRICS:
            value, base = summary[variant][metric], summary["none"][metric]
            if value is None or base is None:
                cells.append("-")
            else:
                cells.append(f"{value:.4f}" + (f" ({value - base:+.4f})" if variant != "none" else ""))
        table.add_row(title, *cells)
    print_table(console, table)
    console.print(
        f"with both images: {summary['unique_ratio']:.3f} unique images per image reference, "
        f"{summary['bytes_sent_per_step'] / 1e6:.2f} MB sent per step, {summary['samples_per_s']:,.0f} samples/s"
    )


def main(
    place: Annotated[Path, typer.Option("--dir", help="Folder of the demo.")] = Path("data/demo"),
    seed: Annotated[int, typer.Option(help="Seed of the data, of VGG16's random weights and of the trainings.")] = 0,
    ranks: Annotated[int, typer.Option("-np", "--ranks", min=1, help="Ranks that train.")] = 2,
    small: Annotated[bool, typer.Option("--small", help="A few hundred images: minutes, and noisy metrics.")] = False,
    images: Annotated[Path | None, typer.Option(help="Your photographs, in place of drawn clothes.")] = None,
    labels: Annotated[Path | None, typer.Option(help="CSV with a label for each photograph.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a demo made with other options.")] = False,
    part: Annotated[
        Literal["all", "features", "rest"], typer.Option(help="Stop after the features, or begin behind them.")
    ] = "all",
) -> None:
    """Show what images add to IDs, end to end, on this machine."""
    started = time.monotonic()
    if part != "rest":
        make_features(place, seed, small, force, images, labels)
    if part == "features":
        return
    make_samples(place)
    summary = summarise({variant: train(place, variant, seed, ranks) for variant in VARIANTS})
    show(summary)
    report = place / "report.json"
    write_json(report, summary | {"serving": serve(place, images)})
    evaluate: list[str | Path] = [*CROSSMEDIA, "evaluate", place / "runs/both"]
    run_step("What the run is worth: intervals and slices", [*evaluate, "--html", place / "evaluation.html"])
    explorer = show_pages(place, images)
    console.print(
        f"written to {report}; {(time.monotonic() - started) / 60:.1f} minutes in all\n\n"
        f"look at it: open {place / 'pages/index.html'}, or with searches, uploads and the scorer:"
    )
    console.print(f"$ {shlex.join(map(str, explorer))}", style="cyan", soft_wrap=True)


app = CommandApp(rich_markup_mode="markdown")
app.command(epilog=EXAMPLES)(main)

if __name__ == "__main__":
    run_app(app)
