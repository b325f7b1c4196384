"""A drawn shop of any size, and the stages from its logs to a served model, each measured as a user runs it.

A shop with N impressions in ten days has N / 10 users and N / 10 items with an image each, and two behaviours for each
impression. Items are as popular as the square of a uniform number says. Letters: N rows, D numbers of a vector.
"""

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.process import memory_of_children, run_to_end, serving
from benchmarks.serve.client import one_after_the_other
from benchmarks.serve.sections import bodies_of

Int64 = NDArray[np.int64]

DAYS = 10
SESSION = 5  # impressions
SAMPLES_ALONE = "samples"
_BEHAVIORS = 2  # for each impression
_CATEGORIES, _SCENES = 2000, 8
_FIRST_S, _DAY_S = 1_767_225_600, 86_400  # 2026-01-01
_BLOCK_ROWS = 50_000
_RANKS = 2
_CANDIDATES = 200


@dataclass(frozen=True)
class Shop:
    """A shop that is drawn: its impressions, and the width of its image vectors."""

    impressions: int
    dims: int
    seed: int = 0

    @property
    def users(self) -> int:
        """Users, and as many items with an image each."""
        return max(self.impressions // 10, 100)

    def write_logs(self, folder: Path) -> None:
        """Write impressions and behaviours as `build_samples` reads them, a file a day."""
        for log in ("impressions", "behaviors"):
            (folder / log).mkdir(parents=True)
        for day in range(DAYS):
            draw = np.random.default_rng([self.seed, 1, day])
            sessions = self.impressions // DAYS // SESSION
            for log, table in (("impressions", self._shown(draw, day, sessions)), ("behaviors", self._done(draw, day))):
                pq.write_table(table, folder / log / f"day-{day:02d}.parquet")

    def write_vectors(self, folder: Path) -> None:
        """Write a vector for each image, as `import_features` reads them."""
        folder.mkdir(parents=True)
        for number, start in enumerate(range(0, self.users, _BLOCK_ROWS)):
            item_N = np.arange(start, min(start + _BLOCK_ROWS, self.users))
            draw = np.random.default_rng([self.seed, 2, number])
            vectors_ND = draw.standard_normal((len(item_N), self.dims), dtype=np.float32)
            vectors_ND[:, 0] += self._quality()[item_N]
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.ravel()), self.dims)
            pq.write_table(pa.table({"id": _uris(item_N), "vector": vectors}), folder / f"part-{number:04d}.parquet")

    def _shown(self, draw: np.random.Generator, day: int, sessions: int) -> pa.Table:
        start_S = np.sort(draw.integers(0, _DAY_S - 60, sessions)) + _FIRST_S + day * _DAY_S
        session_N = np.repeat(np.arange(sessions), SESSION)
        item_N = self._items(draw, len(session_N))
        chance_N = 1 / (1 + np.exp(1.5 - self._quality()[item_N]))
        return _table(
            {
                "timestamp": _times(np.repeat(start_S, SESSION) + np.tile(np.arange(SESSION), sessions)),
                "user": np.repeat(draw.integers(0, self.users, sessions), SESSION),
                "session": session_N + day * sessions,
                "scene": draw.integers(0, _SCENES, len(session_N)),
                **_of_items(item_N),
                "label": (draw.random(len(item_N)) < chance_N).astype(np.int8),
            }
        )

    def _done(self, draw: np.random.Generator, day: int) -> pa.Table:
        count = _BEHAVIORS * self.impressions // DAYS
        return _table(
            {
                "timestamp": _times(np.sort(draw.integers(0, _DAY_S, count)) + _FIRST_S + day * _DAY_S),
                "user": draw.integers(0, self.users, count),
                **_of_items(self._items(draw, count)),
                "dwell_s": draw.exponential(30.0, count).astype(np.float32),
            }
        )

    def _items(self, draw: np.random.Generator, count: int) -> Int64:
        return (self.users * draw.random(count) ** 2).astype(np.int64)

    def _quality(self) -> NDArray[np.float32]:
        return np.random.default_rng([self.seed, 3]).standard_normal(self.users, dtype=np.float32)


def _table(columns: dict[str, Any]) -> pa.Table:
    return pa.table(columns)


def _of_items(item_N: Int64) -> dict[str, Any]:
    return {"item": item_N, "image": _uris(item_N), "category": item_N % _CATEGORIES}


def _uris(item_N: Int64) -> Any:
    join: Any = pc.binary_join_element_wise
    return join("shop/", pa.array(item_N).cast(pa.string()), ".jpg", "")


def _times(seconds_N: Int64) -> Any:
    return pa.array(seconds_N * 1_000_000).cast(pa.timestamp("us", tz="UTC"))


@dataclass(frozen=True)
class Stage:
    """What one stage took, the start of its programs included."""

    seconds: float
    memory_mb: float
    """The most that its processes had at one moment, without pages of mapped files."""
    written_mb: float


@dataclass(frozen=True)
class Served:
    """What a scorer of the exported model took, on one core, the client on the others."""

    ready_s: float
    """From its start to its readiness."""
    memory_mb: float
    p50_ms: float
    p99_ms: float
    """Of requests with 200 ads, each sent when the one before is answered."""


@dataclass(frozen=True)
class Place:
    """The folder of one shop, its input drawn already."""

    shop: Shop
    folder: Path

    def draw(self) -> None:
        """Draw logs and vectors, where that is not done; half of them are never taken for all."""
        drawn, scratch = self.folder / "drawn", self.folder / "drawn.new"
        if not drawn.exists():
            shutil.rmtree(scratch, ignore_errors=True)
            self.shop.write_logs(scratch / "logs")
            self.shop.write_vectors(scratch / "vectors")
            scratch.rename(drawn)

    def stages(self, samples_alone: bool) -> Iterator[tuple[str, Stage]]:
        """Run the stages one after the other. Raises RunFailedError."""
        for name, command, output in self._commands():
            path = self.folder / output
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            start_s = time.perf_counter()
            memory = run_to_end(command, self.folder / f"{name}.log")
            seconds = time.perf_counter() - start_s
            peak = max(memory, default=0)
            yield name, Stage(seconds, peak / 1e6, _bytes_of(path) / 1e6)
            if samples_alone and name == SAMPLES_ALONE:
                return

    def serve(self, requests: int) -> Served:
        """Serve the exported model, and score the test samples' users. Raises RunFailedError."""
        bodies = bodies_of(self.folder / "samples", _CANDIDATES, min(requests, 200))
        start_s = time.perf_counter()
        with serving(["-m", "serving", "serve", str(self.folder / "model")], self.folder / "serve.log") as port:
            ready_s = time.perf_counter() - start_s
            one_after_the_other(port, bodies, max(requests // 10, 10))
            load = one_after_the_other(port, bodies, requests)
            memory = memory_of_children()
        assert not load.failed, f"{load.failed} requests failed"
        return Served(ready_s, memory / 1e6, load.ms(50), load.ms(99))

    def _commands(self) -> Iterator[tuple[str, list[str], str]]:
        """Name, command and output of each stage."""
        python, at = sys.executable, {name: str(self.folder / name) for name in ("samples", "store")}
        at |= {name: str(self.folder / "drawn" / name) for name in ("logs", "vectors")}
        ranks = [str(Path(python).with_name("horovodrun")), "-np", str(_RANKS), python]
        run = str(self.folder / "runs" / "growth")
        build = ["jobs/build_samples.py", "--logs", at["logs"], "--samples", at["samples"], "--test-days", "1"]
        yield SAMPLES_ALONE, [python, *build], "samples"
        bring = ["jobs/import_features.py", "--from", at["vectors"], "--store", at["store"], "--name", "drawn"]
        yield "store", [python, *bring, "--source", "drawn vectors"], "store"
        words = [word for each in self._settings(at) for word in ("--set", each)]
        yield "train", [*ranks, "-m", "trainer.main", *words], "runs"
        yield "evaluate", [*ranks, "-m", "trainer.evaluate", run, "--bootstrap", "0"], "runs/growth/evaluation"
        vectors = ["jobs/export_embeddings.py", "--run", run, "--out", str(self.folder / "visual.parquet")]
        yield "export_vectors", [python, *vectors], "visual.parquet"
        model = ["jobs/export_model.py", "--run", run, "--out", str(self.folder / "model")]
        yield "export_model", [python, *model], "model"

    def _settings(self, at: dict[str, str]) -> Sequence[str]:
        rows = 2 * self.shop.users
        return [
            f"data.samples={at['samples']}",
            f"data.store={at['store']}",
            f"data.cache_dir={self.folder / 'cache'}",
            "data.global_batch_size=4000",
            "train.epochs=1",
            "train.checkpoint_every=null",
            f"model.tables={{user: {rows}, item: {rows}, image: {rows}, category: 4096, scene: 256}}",
            f"run.dir={self.folder / 'runs'}",
            "run.name=growth",
            "run.overwrite=true",
            "run.device=cpu",
        ]


def _bytes_of(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(each.stat().st_size for each in files if each.is_file())
