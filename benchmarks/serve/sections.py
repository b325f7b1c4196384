"""What is measured of serving: latency and requests a second of the scorer and its rival, and the models they serve."""

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.parquet as pq

from benchmarks.process import run_to_end, serving
from benchmarks.report import Figure, Section
from benchmarks.serve.client import as_many_as_it_can, one_after_the_other
from benchmarks.workload import Workload

SETTINGS = ("model.pooling=attentive", "train.epochs=1000", "train.checkpoint_every=null")


@dataclass(frozen=True)
class World:
    """A workload, and where what is made of it lies."""

    workload: Workload
    folder: Path
    steps: int

    def run(self, name: str) -> Path:
        """Return the folder of a trained run."""
        return self.folder / "runs" / name

    def model(self, name: str) -> Path:
        """Return the folder of a published model."""
        return self.folder / "models" / name

    def train(self, name: str, *settings: str) -> Path:
        """Train the workload's model for some steps, at one rank; nothing where that has been done with it."""
        folder, made = self.run(name), self.workload.folder / "workload.json"
        report = folder / "report.json"
        if not report.exists() or report.stat().st_mtime < made.stat().st_mtime:
            every = [f"run.dir={folder.parent}", f"run.name={name}", "run.overwrite=true"]
            every += [f"train.max_steps={self.steps}", *SETTINGS, *settings]
            words = [word for each in every for word in ("--set", each)]
            self.finish(["-m", "trainer.main", "--config", str(self.workload.config), *words])
        return folder

    def publish(self, name: str) -> Path:
        """Publish a run as a new model of its name, compiled for this machine."""
        folder = self.model(name)
        shutil.rmtree(folder, ignore_errors=True)
        self.finish(["jobs/export_model.py", "--run", str(self.run(name)), "--out", str(folder), "--compile"])
        return folder

    def finish(self, arguments: Sequence[str]) -> None:
        """Run a program of this repository to its end. Raises RunFailedError."""
        run_to_end([sys.executable, *arguments], self.folder / "log.txt")


_USERS = 1000


_NO_INPUTS = ("label", "session", "timestamp", "day")


def bodies_of(samples: Path, candidates: int, count: int, seed: int = 0) -> list[bytes]:
    """Draw JSON bodies of requests: one of the first users of test samples, candidates among all ads shown there."""
    table: Any = pq.read_table(samples / "test", partitioning=None)
    of_ad = [name for name in table.column_names if name.startswith("ad_")]
    of_user = [name for name in table.column_names if name not in (*of_ad, *_NO_INPUTS)]
    ads = {name: table.column(name).combine_chunks().flatten().to_numpy() for name in of_ad}
    users = table.select(of_user).slice(0, _USERS).to_pylist()
    return list(_bodies(users, ads, candidates, count, np.random.default_rng([seed, candidates])))


def _bodies(
    users: Sequence[dict[str, Any]], ads: dict[str, Any], candidates: int, count: int, draw: np.random.Generator
) -> Iterator[bytes]:
    for _ in range(count):
        shown = draw.integers(0, len(ads["ad_item"]), candidates)
        columns = {name: values[shown] for name, values in ads.items()}
        request = {"user": users[int(draw.integers(0, len(users)))], "candidates": columns}
        yield orjson.dumps(request, option=orjson.OPT_SERIALIZE_NUMPY)


CANDIDATES = (1, 100, 200, 1000)


def scorer(world: World, name: str) -> list[str]:
    """Return the command of a scorer of a model, which lets requests wait however long it takes."""
    return ["-m", "serving", "serve", str(world.model(name)), "--max-wait-ms", "60000"]


def measure_speed(world: World, requests: int, rounds: int) -> list[Section]:
    """Measure the scorer and its rivals in turns. `both` and `none` are published.

    Each server is measured in every round; its best one counts: what disturbs only adds time.
    """
    bodies = {candidates: bodies_of(world.workload.samples, candidates, 200) for candidates in CANDIDATES}
    commands = {
        "scorer": scorer(world, "both"),
        "scorer_none": scorer(world, "none"),
        "fastapi": ["-m", "benchmarks.serve.rivals", str(world.run("both")), str(world.model("both"))],
    }
    best: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for name, command in commands.items():
            with serving(command, world.folder / f"{name}.log") as port:
                figures = _figures(port, bodies, requests)
            best[name] = _better(best.get(name, figures), figures)
    scorer_, fast = best["scorer"], best["fastapi"]
    ratios: dict[str, Figure] = {
        "http_p50_ms_200": scorer_["p50_ms_200"],
        "http_p99_ms_200": scorer_["p99_ms_200"],
        "images_vs_none": scorer_["p50_ms_200"] / best["scorer_none"]["p50_ms_200"],
        "vs_fastapi_eager_rps": scorer_["rps_200"] / fast["rps_200"],
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
