"""How much of the bare network's speed is left when images are read, decoded, computed, staged and committed.

    python -m benchmarks.extract --images DIR [--json FILE] [--limit N]

Both sides run in one worker process with the same torch threads and the same built network, in turns over the same
images, and count nothing of the start: not the processes, not the making of the weights. Bare: the network alone on
batches that lie in memory ready normalised in the compute dtype. Extract: all of `pipeline.extract.extract`, from the
listing to the commit, each time into a new store. The ratio is the median over the rounds, each of one turn per side,
so that a neighbour who takes the processor for a while moves one round and not the figure.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import numpy as np
import torch
import typer
from distributed import Client

from benchmarks.report import Figure, write_report
from pipeline.backbone import ComputeDType, backbone
from pipeline.cluster import connect
from pipeline.decode import prepare
from pipeline.extract import ExtractOptions, describe_network, extract
from pipeline.parts import torch_threads
from pipeline.source import list_images, read_image
from pipeline.tasks import run_alone

WEIGHTS = "random:0"  # the speed does not depend on the values

app = typer.Typer(add_completion=False)


@app.command()
def main(
    images: Annotated[str, typer.Option(help="Folder of photographs.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here as well.")] = None,
    limit: Annotated[int, typer.Option(min=16, help="Use the first so many images.")] = 400,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each side over all of these images.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per pass, on both sides.")] = 16,
) -> None:
    """Compare the extraction with the bare network; prints the figures."""
    locations = [ref.location for ref in list_images(images).images[:limit]]
    with connect(workers=1, threads_per_worker=1) as client:
        compute_dtype = cast("ComputeDType", describe_network(client, WEIGHTS, "auto").compute_dtype)
        run_alone(client, bare_seconds, locations[:batch_size], batch_size, compute_dtype)  # warm both sides up
        extract_seconds(client, locations[:batch_size], batch_size)
        bare_s, extract_s = [], []
        for turn in range(rounds):
            for side in ("bare", "extract") if turn % 2 == 0 else ("extract", "bare"):
                if side == "bare":
                    bare_s.append(run_alone(client, bare_seconds, locations, batch_size, compute_dtype))
                else:
                    extract_s.append(extract_seconds(client, locations, batch_size))
    ratios = [bare / extracted for bare, extracted in zip(bare_s, extract_s, strict=True)]
    figures: dict[str, Figure] = {
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
    write_report(figures, json_file)


def bare_seconds(locations: Sequence[str], batch_size: int, compute_dtype: ComputeDType) -> float:
    """Seconds of the network alone on these images, which are prepared before the clock starts."""
    network = backbone(WEIGHTS, compute_dtype)
    torch.set_num_threads(torch_threads({}))
    batches = [
        network.normalise(np.stack([prepare(read_image(place)).pixels_HWC for place in locations[i : i + batch_size]]))
        for i in range(0, len(locations), batch_size)
    ]
    start_s = time.perf_counter()
    with torch.inference_mode():
        for batch_BCHW in batches:
            network.network(batch_BCHW).float().cpu()
    return time.perf_counter() - start_s


def extract_seconds(client: Client, locations: Sequence[str], batch_size: int) -> float:
    """Seconds of a whole extraction of these images into a new store."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "images.csv")
        table.write_text("\n".join(["uri", *locations]) + "\n")
        options = ExtractOptions(str(table), f"{folder}/features", WEIGHTS, batch_size=batch_size)
        start_s = time.perf_counter()
        summary = extract(options, client)
        seconds = time.perf_counter() - start_s
    assert summary.num_computed + summary.num_duplicates == len(locations), summary.bad
    return seconds


if __name__ == "__main__":
    app()
