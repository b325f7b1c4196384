"""What is measured of serving: latency and requests a second of the scorer and its rivals; the publish of a change."""

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.process import on_first_core, run_to_end, serving
from benchmarks.report import Figure, Section
from benchmarks.serve.client import as_many_as_it_can, at_rate, one_after_the_other
from benchmarks.serve.world import World
from featurestore import FeatureRows, FeatureStore, to_bits
from serving.bundle.images import PublishReport, export_vectors, networks_for, publish
from serving.bundle.open import ModelVersion
from trainer.runs.checkpoint import read_dense
from trainer.runs.saved import read_run

CANDIDATES = (1, 100, 200, 1000)
_MOST_MS = 10.0
_TRIES = 6
_CHANGED = 0.01
_PUBLISHES = 3


@dataclass(frozen=True)
class Rounds:
    """How much is measured."""

    requests: int
    rounds: int = 3
    """Each server is measured so often, one after the other; the best round counts: what disturbs only adds time."""


def scorer(world: World, name: str) -> list[str]:
    """Return the command of a scorer of a model, which lets requests wait however long it takes."""
    return ["-m", "serving", "serve", str(world.model(name)), "--max-wait-ms", "60000"]


def measure_speed(world: World, rounds: Rounds) -> list[Section]:
    """Measure the scorer and its rivals in turns. `both` and `none` are published."""
    bodies = {candidates: world.bodies(candidates, 200) for candidates in CANDIDATES}
    commands = {
        "scorer": scorer(world, "both"),
        "scorer_none": scorer(world, "none"),
        "fastapi": ["-m", "benchmarks.serve.rivals", "fastapi", str(world.run("both")), str(world.model("both"))],
    }
    best: dict[str, dict[str, float]] = {}
    rate = 0.0
    for number in range(rounds.rounds):
        for name, command in commands.items():
            with serving(command, world.folder / f"{name}.log") as port:
                figures = _figures(port, bodies, rounds.requests)
                if name == "scorer":
                    rate = max(rate, _rate(port, bodies[200], figures["rps_200"], rounds.requests))
            best[name] = _better(best.get(name, figures), figures)
        figures = _engine(world, bodies[100])
        best["engine"] = _better(best.get("engine", figures), figures) if number else figures
    scorer_, fast = best["scorer"], best["fastapi"]
    ratios: dict[str, Figure] = {
        "http_p50_ms_200": scorer_["p50_ms_200"],
        "http_p99_ms_200": scorer_["p99_ms_200"],
        "images_vs_none": scorer_["p50_ms_200"] / best["scorer_none"]["p50_ms_200"],
        "vs_engine_rps": scorer_["rps_100"] / best["engine"]["rps_100"],
        "vs_fastapi_eager_rps": scorer_["rps_200"] / fast["rps_200"],
        "rps_at_p99_10ms": rate,
    }
    return [Section("the scorer over HTTP", ratios), Section("each server", grid=best, prefix="http_")]


def _figures(port: int, bodies: Mapping[int, list[bytes]], requests: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    for candidates, some in bodies.items():
        one_after_the_other(port, some, max(requests // 10, 10))
        alone = one_after_the_other(port, some, requests)
        together = as_many_as_it_can(port, some, requests)
        assert not alone.failed + together.failed, f"{alone.failed + together.failed} requests failed"
        figures |= {
            f"p50_ms_{candidates}": alone.ms(50),
            f"p99_ms_{candidates}": alone.ms(99),
            f"rps_{candidates}": together.rps,
        }
    return figures


def _better(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: (max if name.startswith("rps") else min)(one[name], other[name]) for name in one}


def _rate(port: int, bodies: list[bytes], most: float, requests: int) -> float:
    """Find the highest rate, up to what connections without pause get, at which 99 of 100 take 10 ms or less."""
    low, high = 0.0, most
    for _ in range(_TRIES):
        middle = (low + high) / 2
        load = at_rate(port, bodies, max(requests, int(2 * middle)), middle)
        if load.ms(99) <= _MOST_MS and not load.failed:
            low = middle
        else:
            high = middle
    return low


def _engine(world: World, bodies: list[bytes]) -> dict[str, float]:
    """Time the trainer's engine on one core, in a process of its own."""
    path, figures = world.folder / "bodies.jsonl", world.folder / "engine.json"
    path.write_bytes(b"\n".join(bodies))
    command = [*on_first_core(), sys.executable, "-m", "benchmarks.serve.rivals", "engine", str(world.run("both"))]
    run_to_end([*command, "--bodies", str(path), "--json", str(figures)], world.folder / "engine.log")
    found = json.loads(figures.read_text())
    return {"rps_100": found["rps"], "p50_ms_100": found["p50_ms"]}


def measure_delta(world: World) -> list[Section]:
    """Compare the publish of changed features of some images with vectors of all images.

    Both run in this process, in turns: the best round of each counts.
    """
    features = world.folder / "features"
    shutil.rmtree(features, ignore_errors=True)
    shutil.copytree(world.workload.store, features)
    full = _Best()
    parts = _Best()
    for number in range(_PUBLISHES):
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
