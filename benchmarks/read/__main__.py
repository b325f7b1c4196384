"""How many samples a rank decodes over those that it trains on, its bytes from S3, and how well samples are mixed.

    python -m benchmarks.read [--dir DIR] [--json FILE]

The paper-shaped samples in row groups of 128 sample groups, in four layouts: files of 8 full row groups (`even`), files
of uneven lengths (`uneven`), one row group 20 times as large as the others (`huge`), and a file for each row group
(`single`). Reading needs no collective, so one process takes the part of each rank, one after the other: of the first
layout of every rank, of the others of the one that has most to decode. `old` is one stream
(`data.shuffle_streams=1`), as all reading was before there were streams, read as the last rank.

Two figures say how samples are mixed, both over what a full shuffle of all sample groups gives. `mixing`: the variance
of the samples of a batch that come from one file; 1 or less is as well mixed. `distance`: how many steps apart two
groups are, in the mean, that are neighbours in a file; what stays in a window stays near.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any
from unittest import mock

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.read.layouts import LAYOUTS, ROW_GROUP, write_layouts
from benchmarks.report import Figure, JsonPath, Section, write_sections
from benchmarks.workload import Knobs, make
from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import progress_bars

if TYPE_CHECKING:
    from trainer.samples.reader import SampleIndex, SampleReader
    from trainer.schema import Schema

RANKS = (1, 8, 40)
DEFAULT_FOLDER = Path("data/bench/read")
WINDOW_GROUPS = 128  # as in the preset

app = CommandApp(report=True, failures=(OSError,))


@app.command()
def main(
    folder: Annotated[Path, typer.Option("--dir", help="Where the samples are, or are made.")] = Path(
        "data/bench/read"
    ),
    json_file: JsonPath = None,
    row_groups: Annotated[int, typer.Option(help="Of 128 sample groups, 640 samples.", min=64)] = 1_024,
    batch_size: Annotated[int, typer.Option(help="Samples of a step, over all ranks.", min=1)] = 16_384,
    s3: Annotated[bool, typer.Option(help="Also read from a SeaweedFS server that is started meanwhile.")] = True,
) -> None:
    """Read what 1, 8 and 40 ranks would; prints the figures."""
    with progress_bars() as progress:
        sizes = {"samples_per_rank": 5 * ROW_GROUP, "steps": row_groups, "test_samples": 320, "row_group": ROW_GROUP}
        workload = make(folder / "workload", Knobs(images=2_000, dim=2, **sizes), progress)
        schema = write_layouts(folder, workload.samples / "train", workload.folder / "schema.yaml", row_groups)
        grid: dict[str, dict[str, Figure]] = {layout: {} for layout in LAYOUTS}
        even = Source(str(folder / "even"), schema, batch_size)
        for layout, ranks in progress.track([*product(LAYOUTS, RANKS)], description="decode"):
            grid[layout] |= decoded(Source(str(folder / layout), schema, batch_size), ranks, every=layout == "even")
        old: dict[str, Figure] = {}
        for ranks in progress.track(RANKS, description="decode the old way"):
            old |= decoded(even.with_one_stream(), ranks, every=False)
        mixed = mixing_figures(even)
        from_s3 = s3_figures(even, progress) if s3 else {}
    shares = {name: value for name, value in grid["even"].items() if name.startswith("decode_share")}
    write_sections(
        [
            Section("figures of this run", shares),
            Section("samples decoded over own, of the rank with most", grid=grid),
            Section("one stream, the old way", {f"old_{name}": value for name, value in old.items()}),
            Section("mixing, over a full shuffle", mixed),
            Section("read from S3", from_s3),
        ],
        json_file,
    )


@dataclass(frozen=True)
class Source:
    """Samples to read, and how; `streams` None: as many as the trainer chooses."""

    samples: str
    schema: "Schema"
    batch_size: int
    streams: int | None = None

    def with_one_stream(self) -> "Source":
        """Return the same, read the old way."""
        return replace(self, streams=1)

    def index(self) -> "SampleIndex":
        """Open the training samples."""
        from trainer.comm import SoloComm
        from trainer.samples.reader import open_index

        return open_index(SoloComm(), self.samples, "train", self.schema)

    def reader(self, index: "SampleIndex", rank: int, num_ranks: int) -> "SampleReader":
        """Make the reader of one rank of a number of ranks, as a run makes it."""
        from trainer.config.config import DataConfig
        from trainer.samples.order import streams_of
        from trainer.samples.reader import SampleReader

        data = DataConfig(
            global_batch_size=self.batch_size, shuffle_window_groups=WINDOW_GROUPS, shuffle_streams=self.streams
        )
        return SampleReader(
            index,
            self.schema,
            rank=rank,
            num_ranks=num_ranks,
            batch_size=self.batch_size,
            seed=0,
            window_groups=WINDOW_GROUPS,
            streams=streams_of(data, len(index.row_groups)),
        )


def decoded(source: Source, num_ranks: int, *, every: bool) -> dict[str, Figure]:
    """Read an epoch as every rank, or as the one that decodes most.

    Returns the most decoded over own samples, and the largest part of a step over the mean one.
    """
    index = source.index()
    expected = source.reader(index, 0, num_ranks).decode_shares(num_ranks)
    ranks = range(num_ranks) if every else [int(np.argmax(expected))]
    shares, uneven = [], []
    for rank in ranks:
        reader = source.reader(index, rank, num_ranks)
        sizes = [(batch.num_samples, batch.global_samples) for batch in reader.batches()]
        shares.append(reader.num_decoded / max(1, sum(own for own, _ in sizes)))
        uneven.append(max(own * num_ranks / whole for own, whole in sizes[:-1]))
    return {f"decode_share_{num_ranks}": max(shares), f"largest_part_{num_ranks}": max(uneven)}


def mixing_figures(source: Source) -> dict[str, Figure]:
    """Measure how well an epoch is mixed, new and old, over a full shuffle of the same sample groups."""
    index = source.index()
    file_B = np.repeat(
        np.unique([r.file for r in index.row_groups], return_inverse=True)[1], [r.num_samples for r in index.row_groups]
    )
    full = np.random.default_rng(1).permutation(np.arange(index.num_samples).reshape(-1, 5)).ravel()
    ideal = _variance(full, file_B, source.batch_size), _distance(full, source.batch_size)
    figures: dict[str, Figure] = {}
    for prefix, each in (("", source), ("old_", source.with_one_stream())):
        reader = each.reader(index, 0, 1)
        order = np.concatenate([batch.fields["serial"].values_N for batch in reader.batches()])
        figures[f"{prefix}mixing"] = _variance(order, file_B, source.batch_size) / ideal[0]
        figures[f"{prefix}distance"] = _distance(order, source.batch_size) / ideal[1]
    return figures


def _variance(order: NDArray[np.int64], file_B: NDArray[Any], batch_size: int) -> float:
    """The variance of the samples of a batch that are of one file, over whole batches and files."""
    batches = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
    counts = np.array([np.bincount(file_B[batch], minlength=file_B.max() + 1) for batch in batches])
    return float(np.square(counts - np.bincount(file_B) * (batch_size / len(order))).mean())


def _distance(order: NDArray[np.int64], batch_size: int) -> float:
    """The mean distance, in steps, of sample groups that are neighbours in a file."""
    step = np.empty(len(order))
    step[order] = np.arange(len(order)) // batch_size
    return float(np.abs(np.diff(step[::5])).mean())


def s3_figures(source: Source, progress: Any) -> dict[str, Figure]:
    """Measure megabytes that the last rank reads from S3 in an epoch, and its speed, new and old."""
    from featurestore.storage.storage import Storage
    from tests.servers import environment_of, new_bucket, seaweedfs

    figures: dict[str, Figure] = {}
    with TemporaryDirectory() as folder, ExitStack() as stack:
        server = seaweedfs(Path(folder))
        stack.callback(server.kill)
        server.start()
        stack.enter_context(environment_of(server.endpoint))
        bucket = Storage(new_bucket())
        files = sorted(Path(source.samples, "train").iterdir())
        for file in progress.track(files, description="copy to S3"):
            bucket.write_bytes(f"train/{file.name}", file.read_bytes())
        figures["file_mb"] = sum(file.stat().st_size for file in files) / 1e6
        there = replace(source, samples=bucket.url)
        ways = {"": there, "old_": there.with_one_stream()}
        for (prefix, each), ranks in progress.track([*product(ways.items(), RANKS)], description="read from S3"):
            reader = each.reader(each.index(), ranks - 1, ranks)
            start_s = time.perf_counter()
            with bytes_counted() as sizes:
                samples = sum(batch.num_samples for batch in reader.batches())
            figures[f"{prefix}s3_mb_per_rank_{ranks}"] = sum(sizes) / 1e6
            figures[f"{prefix}s3_samples_per_s_{ranks}"] = samples / (time.perf_counter() - start_s)
    return figures


@contextmanager
def bytes_counted() -> Iterator[list[int]]:
    """Yield a list that gets the size of every answer that this process reads from an object store."""
    from featurestore.storage.remote import RemoteFiles

    sizes: list[int] = []
    read = RemoteFiles.read_bytes

    def counted(self: RemoteFiles, path: str, start: int | None = None, end: int | None = None) -> bytes:
        data = read(self, path, start, end)
        sizes.append(len(data))
        return data

    with mock.patch.object(RemoteFiles, "read_bytes", counted):
        yield sizes


if __name__ == "__main__":
    run_app(app)
