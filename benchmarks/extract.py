"""How much of the bare network's speed is left when images are read, decoded, computed, staged and committed.

    python -m benchmarks.extract [--images DIR] [--json FILE] [--limit N]

Without --images the pictures of the demo are drawn into a temporary folder.

Both sides run in one worker process with the same torch threads and the same built network, in turns over the same
images, and count nothing of the start: not the processes, not the making of the weights. Bare: the network alone on
batches that lie in memory ready normalised in the compute dtype. Extract: all of `pipeline.features.refresh`, from the
listing to the commit, each time into a new store. The ratio is the median over the rounds, each of one turn per side,
so that a neighbour who takes the processor for a while moves one round and not the figure.
"""

import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from benchmarks.report import Figure, JsonPath, Section, write_sections
from benchmarks.timing import in_turns
from featurestore.console.commandline import CommandApp, run_app
from pipeline.errors import StoreRunError
from pipeline.network import DEFAULT_BACKBONE

if TYPE_CHECKING:
    from distributed import Client

    from featurestore.lookup import AutoDType

WEIGHTS = "random:0"  # the speed does not depend on the values

app = CommandApp(report=True)


@app.command()
def main(
    images: Annotated[str | None, typer.Option(help="Folder of photographs.", show_default="drawn ones")] = None,
    json_file: JsonPath = None,
    limit: Annotated[int, typer.Option(min=1, help="Draw this many images, or use the first ones of DIR.")] = 320,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each side over all of these images.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per pass, on both sides.")] = 16,
) -> None:
    """Compare the extraction with the bare network; prints the figures."""
    from pipeline.images.source import list_images

    with tempfile.TemporaryDirectory() as folder:
        if images is None:
            draw_images(Path(folder), limit)
        locations = [ref.location for ref in list_images(images or folder).images[:limit]]
        figures = compare(locations, rounds, batch_size)
    write_sections([Section("figures of this run", figures)], json_file)


def draw_images(folder: Path, count: int) -> None:
    """Draw `count` pictures of clothes, no two of equal bytes: a copy would not go through the network."""
    from pipeline.demo.items import draw_garment, plan_garments

    planned = count
    while len(garments := list(dict.fromkeys(plan_garments(planned, seed=0)))) < count:
        planned *= 2
    for number, garment in enumerate(garments[:count]):
        (folder / f"{number:05d}.jpg").write_bytes(draw_garment(garment))


def compare(locations: Sequence[str], rounds: int, batch_size: int) -> dict[str, Figure]:
    """Measure both sides over the images at `locations`. Raises PipelineError, FeatureStoreError."""
    from pipeline.cluster.tasks import connect, run_alone
    from pipeline.features.refresh import describe_network
    from pipeline.network.backbone import UntrainedWeightsWarning

    with warnings.catch_warnings(), connect(workers=1, threads_per_worker=1) as client:
        warnings.simplefilter("ignore", UntrainedWeightsWarning)
        compute_dtype = cast("AutoDType", describe_network(client, DEFAULT_BACKBONE, WEIGHTS, "auto").compute_dtype)
        run_alone(client, bare_seconds, locations[:batch_size], batch_size, compute_dtype)  # warm both sides up
        extract_seconds(client, locations[:batch_size], batch_size)
        bare_s, extract_s = [], []
        for _, side in in_turns(("bare", "extract"), rounds):
            if side == "bare":
                bare_s.append(run_alone(client, bare_seconds, locations, batch_size, compute_dtype))
            else:
                extract_s.append(extract_seconds(client, locations, batch_size))
    ratios = [bare / extracted for bare, extracted in zip(bare_s, extract_s, strict=True)]
    return {
        "extract_vs_bare": statistics.median(ratios),
        "extract_vs_bare_lowest": min(ratios),
        "extract_vs_bare_highest": max(ratios),
        "extract_images_per_s": len(locations) / statistics.median(extract_s),
        "bare_images_per_s": len(locations) / statistics.median(bare_s),
        "rounds": rounds,
        "images": len(locations),
        "batch_size": batch_size,
        "compute_dtype": compute_dtype,
    }


def bare_seconds(locations: Sequence[str], batch_size: int, compute_dtype: "AutoDType") -> float:
    """Measure seconds of the network alone on these images, which are prepared before the clock starts."""
    import numpy as np
    import torch

    from pipeline.features.part import torch_threads
    from pipeline.images.decode import prepare
    from pipeline.images.source import read_image
    from pipeline.network.backbone import backbone

    network = backbone(DEFAULT_BACKBONE, WEIGHTS, compute_dtype)
    torch.set_num_threads(torch_threads({}))
    batches = [
        network.normalise(
            np.stack([prepare(read_image(place), network.preset).pixels_HWC for place in locations[i : i + batch_size]])
        )
        for i in range(0, len(locations), batch_size)
    ]
    start_s = time.perf_counter()
    with torch.inference_mode():
        for batch_BCHW in batches:
            network.network(batch_BCHW).float().cpu()
    return time.perf_counter() - start_s


def extract_seconds(client: "Client", locations: Sequence[str], batch_size: int) -> float:
    """Measure seconds of a whole extraction of these images into a new store. Raises StoreRunError where one is bad."""
    from pipeline.features.refresh import extract
    from pipeline.options import ExtractOptions
    from pipeline.store_run import describe_bad

    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "images.csv")
        table.write_text("\n".join(["uri", *locations]) + "\n")
        options = ExtractOptions(images=str(table), store=f"{folder}/features", weights=WEIGHTS, batch_size=batch_size)
        start_s = time.perf_counter()
        summary = extract(options, client)
        seconds = time.perf_counter() - start_s
    if summary.bad:
        raise StoreRunError(f"only good images can be timed: {describe_bad(summary.bad)}")
    return seconds


if __name__ == "__main__":
    run_app(app)
