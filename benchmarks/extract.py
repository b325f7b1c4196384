"""How much of the bare network's speed is left when images are read, decoded, computed, staged and committed.

    python -m benchmarks.extract [--images DIR] [--json FILE] [--limit N]

Without --images the pictures of the demo are drawn into a temporary folder.

Each side has a worker process of its own, with the same threads; they run in turns over the same images, and count
nothing of the start: not the processes, the making of the weights, compiling, or the calibration of int8. Torch: its
network alone, in the precision that it is quickest in here, on batches that lie in memory ready normalised. The others:
all of `pipeline.features.refresh` in one precision, from the listing to the commit, each time into a new store, by
OpenVINO where it is installed; int8 only there. A ratio is the median over the rounds, each of one turn per side, so
that a neighbour who takes the processor for a while moves one round and not the figure. On a machine that others use,
the ratio of the processor's time says more: it is counted too.
"""

import contextlib
import functools
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from benchmarks.problems import Problem
from benchmarks.report import Figure, JsonPath, Section, write_sections
from benchmarks.timing import in_turns
from featurestore.console.commandline import CommandApp, run_app
from pipeline.errors import StoreRunError
from pipeline.network import DEFAULT_BACKBONE, PrecisionName

if TYPE_CHECKING:
    from distributed import Client

    from featurestore.lookup import AutoDType
    from featurestore.spec import StoreInfo
    from pipeline.network.backbone import Compute

WEIGHTS = "random:0"  # the speed does not depend on the values
TORCH = "torch"
WARM_UP = 96  # images, which int8 is calibrated on as well

app = CommandApp(report=True)


class Seconds(NamedTuple):
    """What one turn took: on the clock, and of all cores of the processor."""

    wall: float
    cpu: float


@app.command()
def main(
    images: Annotated[str | None, typer.Option(help="Folder of photographs.", show_default="drawn ones")] = None,
    json_file: JsonPath = None,
    limit: Annotated[int, typer.Option(min=1, help="Draw this many images, or use the first ones of DIR.")] = 320,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each side over all of these images.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per pass, on all sides.")] = 16,
) -> None:
    """Compare the extraction in each precision with the bare network; prints the figures."""
    from pipeline.images.source import list_images

    with tempfile.TemporaryDirectory() as folder:
        if images is None:
            draw_images(Path(folder), limit)
        locations = [ref.location for ref in islice(list_images(images or folder).images, limit)]
        sections = compare(locations, rounds, batch_size)
    write_sections(sections, json_file)


def draw_images(folder: Path, count: int) -> None:
    """Draw `count` pictures of clothes, no two of equal bytes: a copy would not go through the network."""
    from pipeline.demo.items import draw_garment, plan_garments

    planned = count
    while len(garments := list(dict.fromkeys(plan_garments(planned, seed=0)))) < count:
        planned *= 2
    for number, garment in enumerate(garments[:count]):
        (folder / f"{number:05d}.jpg").write_bytes(draw_garment(garment))


def compare(locations: Sequence[str], rounds: int, batch_size: int) -> list[Section]:
    """Measure all sides over the images at `locations`. Raises PipelineError, FeatureStoreError."""
    from featurestore.lookup import dtype_of_machine
    from pipeline.cluster.tasks import connect, run_alone

    quickest = dtype_of_machine()
    precisions: list[PrecisionName] = [quickest]
    if importlib.util.find_spec("openvino"):
        precisions.append("int8")
    spent: dict[str, list[Seconds]] = {side: [] for side in (TORCH, *precisions)}
    with contextlib.ExitStack() as stack:
        clients = {side: stack.enter_context(connect(workers=1, threads_per_worker=1)) for side in spent}
        run_alone(clients[TORCH], torch_seconds, locations[:batch_size], batch_size, quickest)
        infos: dict[str, StoreInfo] = {
            name: warm_up(clients[name], locations[:WARM_UP], batch_size, name) for name in precisions
        }
        for _, side in in_turns(spent, rounds):
            if side == TORCH:
                seconds = run_alone(clients[side], torch_seconds, locations, batch_size, quickest)
            else:
                seconds = extract_seconds(clients[side], locations, batch_size, infos[side])
            spent[side].append(seconds)
    grid: dict[str, dict[str, Figure]] = {
        name: against(spent[name], spent[TORCH], len(locations)) | errors(infos[name]) for name in precisions
    }
    figures = {
        "extract_vs_bare": grid[quickest]["vs_torch"],
        "compute_dtype": quickest,
        "torch_images_per_s": len(locations) / statistics.median(each.wall for each in spent[TORCH]),
        "torch_images_per_cpu_s": len(locations) / statistics.median(each.cpu for each in spent[TORCH]),
        "rounds": rounds,
        "images": len(locations),
        "batch_size": batch_size,
    }
    return [Section("torch's network alone", figures), Section("extraction over it", grid=grid)]


def against(spent: Sequence[Seconds], torchs: Sequence[Seconds], num_images: int) -> dict[str, Figure]:
    """Compare the rounds of an extraction with those of torch's network."""
    wall = [theirs.wall / mine.wall for mine, theirs in zip(spent, torchs, strict=True)]
    return {
        "vs_torch": statistics.median(wall),
        "vs_torch_lowest": min(wall),
        "vs_torch_highest": max(wall),
        "vs_torch_cpu": statistics.median(theirs.cpu / mine.cpu for mine, theirs in zip(spent, torchs, strict=True)),
        "images_per_s": num_images / statistics.median(each.wall for each in spent),
        "images_per_cpu_s": num_images / statistics.median(each.cpu for each in spent),
    }


def errors(info: "StoreInfo") -> dict[str, Figure]:
    """Give what int8 costs, as it was measured when it was calibrated; empty for other precisions."""
    return {} if info.extractor.int8 is None else {"mean_cosine": info.extractor.int8.mean_cosine}


def torch_seconds(locations: Sequence[str], batch_size: int, precision: "AutoDType") -> Seconds:
    """Measure the network alone on these images, which are prepared before the clock starts."""
    import numpy as np
    import torch

    from pipeline.features.part import torch_threads
    from pipeline.images.decode import prepare
    from pipeline.images.source import read_image
    from pipeline.network.backbone import normalised, preset_of

    compute, preset = torch_network(precision), preset_of(DEFAULT_BACKBONE, WEIGHTS)
    torch.set_num_threads(torch_threads(1))
    batches = [
        normalised(
            np.stack([prepare(read_image(place), preset).pixels_HWC for place in locations[i : i + batch_size]]), preset
        ).to(getattr(torch, precision), memory_format=torch.channels_last)
        for i in range(0, len(locations), batch_size)
    ]
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    for batch_BCHW in batches:
        compute(batch_BCHW)
    return Seconds(time.perf_counter() - start_s, time.process_time() - start_cpu_s)


@functools.cache
def torch_network(precision: "AutoDType") -> "Compute":
    """Build torch's network once for a worker."""
    from pipeline.network.backbone import by_torch, load_weights, network_of

    network = network_of(DEFAULT_BACKBONE, WEIGHTS)
    return by_torch(network.filled(load_weights(network, WEIGHTS)), precision)


def warm_up(client: "Client", locations: Sequence[str], batch_size: int, precision: PrecisionName) -> "StoreInfo":
    """Extract some images, so that the worker has the network; return what the store is, calibrated for int8."""
    from featurestore.store import FeatureStore

    with tempfile.TemporaryDirectory() as folder:
        run_extraction(client, folder, locations, batch_size, precision)
        return FeatureStore.open(f"{folder}/features").info


def extract_seconds(client: "Client", locations: Sequence[str], batch_size: int, info: "StoreInfo") -> Seconds:
    """Measure a whole extraction of these images into a new store. Raises StoreRunError where one is bad."""
    from featurestore.store import FeatureStore

    with tempfile.TemporaryDirectory() as folder:
        FeatureStore.open_or_create(f"{folder}/features", info)
        start_s, start_cpu_s = time.perf_counter(), cpu_seconds(client)
        run_extraction(client, folder, locations, batch_size, "auto")
        return Seconds(time.perf_counter() - start_s, cpu_seconds(client) - start_cpu_s)


def run_extraction(
    client: "Client", folder: str, locations: Sequence[str], batch_size: int, precision: Literal["auto", PrecisionName]
) -> None:
    """Extract these images into the store of a folder. Raises StoreRunError where one is bad."""
    from pipeline.features.refresh import extract
    from pipeline.options import ExtractOptions
    from pipeline.store_run import describe_bad

    table = Path(folder, "images.csv")
    table.write_text("\n".join(["uri", *locations]) + "\n")
    summary = extract(
        ExtractOptions(
            images=str(table),
            store=f"{folder}/features",
            weights=WEIGHTS,
            batch_size=batch_size,
            precision=precision,
        ),
        client,
    )
    if summary.bad:
        raise StoreRunError(Problem.BAD_IMAGES, describe_bad(summary.bad))


def cpu_seconds(client: "Client") -> float:
    """Sum the processor's time of this process, which has the scheduler, and of the worker."""
    seconds: list[float] = list(client.run(time.process_time).values())
    return time.process_time() + sum(seconds)


if __name__ == "__main__":
    # by this name the workers find its functions, and not in __main__
    run_app(importlib.import_module("benchmarks.extract").app)
