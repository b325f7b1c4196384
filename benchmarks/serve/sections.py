"""What is measured of serving: latency and requests a second of the scorer and its rival."""

from collections.abc import Mapping

from benchmarks.process import serving
from benchmarks.report import Figure, Section
from benchmarks.serve.client import as_many_as_it_can, at_rate, one_after_the_other
from benchmarks.serve.world import World

CANDIDATES = (1, 100, 200, 1000)
_MOST_MS = 10.0
_TRIES = 6


def scorer(world: World, name: str) -> list[str]:
    """Return the command of a scorer of a model, which lets requests wait however long it takes."""
    return ["-m", "serving", "serve", str(world.model(name)), "--max-wait-ms", "60000"]


def measure_speed(world: World, requests: int, rounds: int) -> list[Section]:
    """Measure the scorer and its rivals in turns. `both` and `none` are published.

    Each server is measured in every round; its best one counts: what disturbs only adds time.
    """
    bodies = {candidates: world.bodies(candidates, 200) for candidates in CANDIDATES}
    commands = {
        "scorer": scorer(world, "both"),
        "scorer_none": scorer(world, "none"),
        "fastapi": ["-m", "benchmarks.serve.rivals", str(world.run("both")), str(world.model("both"))],
    }
    best: dict[str, dict[str, float]] = {}
    rate = 0.0
    for _ in range(rounds):
        for name, command in commands.items():
            with serving(command, world.folder / f"{name}.log") as port:
                figures = _figures(port, bodies, requests)
                if name == "scorer":
                    rate = max(rate, _rate(port, bodies[200], figures["rps_200"], requests))
            best[name] = _better(best.get(name, figures), figures)
    scorer_, fast = best["scorer"], best["fastapi"]
    ratios: dict[str, Figure] = {
        "http_p50_ms_200": scorer_["p50_ms_200"],
        "http_p99_ms_200": scorer_["p99_ms_200"],
        "images_vs_none": scorer_["p50_ms_200"] / best["scorer_none"]["p50_ms_200"],
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
