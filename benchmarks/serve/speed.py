"""Latency and requests a second: the scorer with images and without, the engine, and FastAPI."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.report import Figure, Section
from benchmarks.serve.client import as_many_as_it_can, at_rate, one_after_the_other
from benchmarks.serve.servers import Server, started
from benchmarks.serve.world import World, figures_of

CANDIDATES = (1, 100, 200, 1000)
_MOST_MS = 10.0
_TRIES = 6


@dataclass(frozen=True)
class Rounds:
    """How much is measured."""

    requests: int
    rounds: int = 3
    """Each server is measured so often, one after the other; the best round counts: what disturbs only adds time."""


def scorer(world: World, name: str) -> list[str]:
    """Return the command of a scorer of a model, which lets requests wait however long it takes."""
    return ["-m", "serving", str(world.model(name)), "--max-wait-ms", "60000"]


def measure(world: World, rounds: Rounds) -> list[Section]:
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
            with started(command, world.folder / f"{name}.log") as server:
                figures = _figures(server, bodies, rounds.requests)
                if name == "scorer":
                    rate = max(rate, _rate(server, bodies[200], figures["rps_200"], rounds.requests))
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


def _figures(server: Server, bodies: Mapping[int, list[bytes]], requests: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    for candidates, some in bodies.items():
        one_after_the_other(server.port, some, max(requests // 10, 10))
        alone = one_after_the_other(server.port, some, requests)
        together = as_many_as_it_can(server.port, some, requests)
        assert not alone.failed + together.failed, f"{alone.failed + together.failed} requests failed"
        figures |= {
            f"p50_ms_{candidates}": alone.ms(50),
            f"p99_ms_{candidates}": alone.ms(99),
            f"rps_{candidates}": together.rps,
        }
    return figures


def _better(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: (max if name.startswith("rps") else min)(one[name], other[name]) for name in one}


def _rate(server: Server, bodies: list[bytes], most: float, requests: int) -> float:
    """Find the highest rate, up to what connections without pause get, at which 99 of 100 take 10 ms or less."""
    low, high = 0.0, most
    for _ in range(_TRIES):
        middle = (low + high) / 2
        load = at_rate(server.port, bodies, max(requests, int(2 * middle)), middle)
        if load.ms(99) <= _MOST_MS and not load.failed:
            low = middle
        else:
            high = middle
    return low


def _engine(world: World, bodies: list[bytes]) -> dict[str, float]:
    """Time the trainer's engine on one core, in a process of its own."""
    path, figures = world.folder / "bodies.jsonl", world.folder / "engine.json"
    path.write_bytes(b"\n".join(bodies))
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])
    try:
        command = ["-m", "benchmarks.serve.rivals", "engine", str(world.run("both")), "--bodies", str(path)]
        found = figures_of(command, figures)
    finally:
        os.sched_setaffinity(0, cores)
    return {"rps_100": found["rps"], "p50_ms_100": found["p50_ms"]}
