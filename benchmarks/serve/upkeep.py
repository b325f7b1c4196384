"""What it takes to keep a model served: a delta publish of one image in a hundred, and memory over many requests."""

import shutil
import time

import numpy as np

from benchmarks.report import Figure, Section
from benchmarks.serve.client import as_many_as_it_can
from benchmarks.serve.servers import started
from benchmarks.serve.speed import scorer
from benchmarks.serve.world import World
from featurestore import FeatureRows, FeatureStore, to_bits
from serving.bundle.images import export_vectors, networks_for
from serving.bundle.publish import publish
from serving.bundle.version import ModelVersion
from trainer.runs.checkpoint import read_dense
from trainer.runs.saved import read_run

_CHANGED = 0.01
_CANDIDATES = 100


def delta(world: World) -> list[Section]:
    """Compare the publish of changed features of some images with vectors of all images, in this process both."""
    features = world.folder / "features"
    shutil.rmtree(features, ignore_errors=True)
    shutil.copytree(world.workload.store, features)
    saved = read_run(world.run("both"))
    state, everything = read_dense(saved.path, saved.state, "stores."), world.folder / "vectors"
    shutil.rmtree(everything, ignore_errors=True)
    start = time.perf_counter()
    of_all = export_vectors(saved, saved.places[0], state, "zeros", str(everything))
    full_s = time.perf_counter() - start
    full_bytes = FeatureStore.open(str(everything / of_all.folder)).snapshot().manifest.file_bytes

    opened = ModelVersion.open(str(world.model("both")))
    (of,) = opened.manifest.vectors
    num_changed = _change(world, FeatureStore.open(str(features)))
    start = time.perf_counter()
    vectors, networks = FeatureStore.open(opened.vectors_url(of)), networks_for(opened, of)
    report = publish(vectors, of, networks, source_url=str(features))
    delta_s = time.perf_counter() - start
    assert (report.changed + report.stayed, report.added, report.removed) == (num_changed, 0, 0)
    figures: dict[str, Figure] = {
        "delta_share": delta_s / full_s,
        "delta_bytes_share": report.num_bytes / full_bytes,
        "delta_s": delta_s,
        "full_s": full_s,
        "delta_images": num_changed,
    }
    return [Section("publish of one image in a hundred", figures)]


def _change(world: World, store: FeatureStore) -> int:
    """Give one image in a hundred the features of another draw."""
    knobs = world.workload.knobs
    draw = np.random.default_rng([knobs.seed, 4])
    numbers_K = draw.choice(knobs.images, max(int(_CHANGED * knobs.images), 1), replace=False)
    values_KD = np.maximum(draw.standard_normal((len(numbers_K), knobs.dim), dtype=np.float32), 0)
    uris = [f"{number}.jpg" for number in numbers_K]
    store.put(FeatureRows.of(uris, to_bits(values_KD, "bfloat16"), keys=world.workload.keys[numbers_K]))
    return len(numbers_K)


def growth(world: World, requests: int) -> list[Section]:
    """Measure by how much the memory of a scorer grows over so many requests, after a tenth of them."""
    bodies = world.bodies(_CANDIDATES, 1000)
    with started(scorer(world, "both"), world.folder / "growth.log") as server:
        as_many_as_it_can(server.port, bodies, max(requests // 10, 1000))
        before_mb = server.resident_mb
        load = as_many_as_it_can(server.port, bodies, requests)
        grown_mb = server.resident_mb - before_mb
    figures: dict[str, Figure] = {
        "rss_growth_mb": grown_mb,
        "rss_mb": before_mb,
        "rss_requests": requests,
        "rss_failed": load.failed,
    }
    return [Section("memory of a scorer", figures)]
