"""What it takes to publish the changed vectors of one image in a hundred, compared with those of all images."""

import contextlib
import shutil
import time
from collections.abc import Iterator

import numpy as np

from benchmarks.report import Figure, Section
from benchmarks.serve.world import World
from featurestore import FeatureRows, FeatureStore, to_bits
from serving.bundle.images import PublishReport, export_vectors, networks_for, publish
from serving.bundle.open import ModelVersion
from trainer.runs.checkpoint import read_dense
from trainer.runs.saved import read_run

_CHANGED = 0.01
_ROUNDS = 3


def measure(world: World) -> list[Section]:
    """Compare the publish of changed features of some images with vectors of all images.

    Both run in this process, in turns: the best round of each counts.
    """
    features = world.folder / "features"
    shutil.rmtree(features, ignore_errors=True)
    shutil.copytree(world.workload.store, features)
    full = _Best()
    parts = _Best()
    for number in range(_ROUNDS):
        full_bytes = _of_all(world, full)
        num_changed = _change(world, FeatureStore.open(str(features)), number)
        report = _of_changed(world, str(features), parts)
        assert (report.changed + report.stayed, report.added, report.removed) == (num_changed, 0, 0)
    figures: dict[str, Figure] = {
        "delta_share": parts.seconds / full.seconds,
        "delta_cpu_share": parts.cpu_s / full.cpu_s,
        "delta_bytes_share": report.num_bytes / full_bytes,
        "delta_s": parts.seconds,
        "full_s": full.seconds,
        "delta_images": num_changed,
    }
    return [Section("publish of one image in a hundred", figures)]


class _Best:
    """The least time that something took, by the clock and of processors; what else runs only adds to it."""

    def __init__(self) -> None:
        self.seconds = self.cpu_s = float("inf")

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        yield
        self.seconds = min(self.seconds, time.perf_counter() - start_s)
        self.cpu_s = min(self.cpu_s, time.process_time() - start_cpu_s)


def _of_all(world: World, best: _Best) -> int:
    """Compute the vectors of all images; returns their bytes."""
    saved, out = read_run(world.run("both")), world.folder / "vectors"
    state = read_dense(saved.checkpoint, saved.state, "stores.")
    shutil.rmtree(out, ignore_errors=True)
    with best.timed():
        made = export_vectors(saved, saved.places[0], state, "zeros", str(out))
    return FeatureStore.open(str(out / made.folder)).snapshot().manifest.file_bytes


def _of_changed(world: World, features: str, best: _Best) -> PublishReport:
    opened = ModelVersion.open(str(world.model("both")))
    (of,) = opened.manifest.vectors
    with best.timed():
        vectors, networks = FeatureStore.open(opened.vectors_url(of)), networks_for(opened, of)
        return publish(vectors, of, networks, source_url=features)


def _change(world: World, store: FeatureStore, number: int) -> int:
    """Give one image in a hundred the features of another draw."""
    knobs = world.workload.knobs
    draw = np.random.default_rng([knobs.seed, 4, number])
    numbers_K = draw.choice(knobs.images, max(int(_CHANGED * knobs.images), 1), replace=False)
    values_KD = np.maximum(draw.standard_normal((len(numbers_K), knobs.dim), dtype=np.float32), 0)
    uris = [f"{number}.jpg" for number in numbers_K]
    store.put(FeatureRows.of(uris, to_bits(values_KD, "bfloat16"), keys=world.workload.keys[numbers_K]))
    return len(numbers_K)
