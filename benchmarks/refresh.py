"""What a refresh of 1 % costs compared with the full extraction, in time and in bytes written.

    python -m benchmarks.refresh [--images DIR] [--json FILE] [--limit N]

Without --images the pictures of the demo are drawn into a temporary folder; those of DIR are copied there. All N are
extracted into a new store; then 1 % of them changes, a third each: new images, images with other bytes, images that are
gone; and the store is refreshed. Both run in one cluster, whose worker has built the network before the clocks start.

Bytes are all that the processes write below the store's folder, staged parts and files replaced later included.
"""

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.extract import draw_images
from benchmarks.report import Figure, JsonPath, write_report
from featurestore.console.commandline import CommandApp, run_app
from pipeline.errors import StoreRunError
from pipeline.network import DEFAULT_BACKBONE

if TYPE_CHECKING:
    from distributed import Client

    from pipeline.features.refresh import RefreshSummary

WEIGHTS = "random:0"  # the speed does not depend on the values
CHANGED_SHARE = 0.01
SHARD_BYTES = 64 << 20  # DESIGN: shards of 10 to 200 MB are comfortable
ROW_BYTES = 8192

app = CommandApp(report=True)


@app.command()
def main(
    images: Annotated[str | None, typer.Option(help="Folder of photographs.", show_default="drawn ones")] = None,
    json_file: JsonPath = None,
    limit: Annotated[int, typer.Option(min=3, help="Draw this many images, or use the first ones of DIR.")] = 1800,
) -> None:
    """Compare a refresh of 1 % with the full extraction; prints the figures."""
    with tempfile.TemporaryDirectory() as folder:
        figures = compare(Path(folder), images, limit)
    write_report(figures, json_file)


def compare(folder: Path, images: str | None, limit: int) -> dict[str, Figure]:
    """Measure the figures of `limit` images in a store below `folder`. Raises PipelineError, FeatureStoreError."""

    from benchmarks.written import count_writes
    from pipeline.cluster.tasks import connect
    from pipeline.features.refresh import extract, refresh
    from pipeline.network.backbone import UntrainedWeightsWarning
    from pipeline.network.described import describe_network
    from pipeline.options import ExtractOptions, RefreshOptions

    photos, fresh = folder / "images", folder / "fresh"
    num_changed = max(1, round(limit * CHANGED_SHARE / 3))
    photos.mkdir()
    fresh.mkdir()
    if images is None:
        draw_images(photos, limit + 2 * num_changed)
    else:
        _copy_images(images, photos, limit + 2 * num_changed)
    paths = sorted(photos.iterdir())
    for path in paths[limit:]:
        path.rename(fresh / path.name)
    num_shards = 1 << max(0, math.ceil(math.log2(limit * ROW_BYTES / SHARD_BYTES)))
    store = str(folder / "features")
    with warnings.catch_warnings(), connect(workers=1, threads_per_worker=1) as client:
        warnings.simplefilter("ignore", UntrainedWeightsWarning)
        describe_network(client, DEFAULT_BACKBONE, WEIGHTS, "auto")
        count_writes(client)
        full_s, full_bytes, full = _measured(
            client,
            lambda: extract(
                ExtractOptions(images=str(photos), store=store, weights=WEIGHTS, num_shards=num_shards), client
            ),
        )
        _change(photos, sorted(fresh.iterdir()), num_changed)
        refresh_s, refresh_bytes, done = _measured(
            client, lambda: refresh(RefreshOptions(images=str(photos), store=store), client)
        )
        again_s, again_bytes, _ = _measured(
            client, lambda: refresh(RefreshOptions(images=str(photos), store=store), client)
        )
    if done.num_new != num_changed or done.num_changed != num_changed or done.num_gone != num_changed:
        raise StoreRunError(f"the refresh did not find the {num_changed} images of each kind: {done}")
    return {
        "time_share": refresh_s / full_s,
        "bytes_share": refresh_bytes / full_bytes,
        "extract_s": full_s,
        "refresh_s": refresh_s,
        "refresh_of_nothing_s": again_s,
        "extract_bytes": full_bytes,
        "refresh_bytes": refresh_bytes,
        "refresh_of_nothing_bytes": again_bytes,
        "images": full.num_images,
        "new": done.num_new,
        "changed": done.num_changed,
        "gone": done.num_gone,
        "num_shards": num_shards,
    }


def _measured(client: "Client", work: Callable[[], "RefreshSummary"]) -> tuple[float, int, "RefreshSummary"]:
    """Measure the seconds of `work` and the bytes that it writes. Raises StoreRunError where an image is bad."""
    from benchmarks.written import written_bytes
    from pipeline.store_run import describe_bad

    before = written_bytes(client)
    start_s = time.perf_counter()
    summary = work()
    seconds = time.perf_counter() - start_s
    if summary.bad:
        raise StoreRunError(f"only good images can be timed: {describe_bad(summary.bad)}")
    return seconds, written_bytes(client) - before, summary


def _change(photos: Path, fresh: Sequence[Path], count: int) -> None:
    """`count` images of each kind: new ones, old ones with other bytes, and old ones that go."""
    old = sorted(photos.iterdir())
    step = len(old) // (2 * count)
    for place, path in enumerate(fresh[:count]):
        path.rename(photos / path.name)
        fresh[count + place].rename(old[2 * place * step])
        old[(2 * place + 1) * step].unlink()


def _copy_images(address: str, photos: Path, count: int) -> None:
    """The first `count` images. Raises SourceError, StoreRunError where they are too few."""
    from pipeline.images.source import list_images, read_image

    refs = list_images(address).images[:count]
    if len(refs) < count:
        raise StoreRunError(f"{address} has {len(refs):,} images, {count:,} are needed: give a smaller --limit")
    for number, ref in enumerate(refs):
        (photos / f"{number:06d}{Path(ref.uri).suffix}").write_bytes(read_image(ref.location))


if __name__ == "__main__":
    run_app(app)
