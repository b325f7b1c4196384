"""What the benchmark serves: runs trained for a few steps, published as models, and request bodies of test samples."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.parquet as pq

from benchmarks.process import run_to_end
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

    def bodies(self, candidates: int, count: int, seed: int = 0) -> list[bytes]:
        """Draw JSON bodies of requests: a user of the test samples, and candidates among all ads shown in them."""
        users, ads = self.logged()
        return list(_bodies(users, ads, candidates, count, np.random.default_rng([seed, candidates])))

    def logged(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Read the test samples: each user's columns, and the columns of all ads shown, an array each."""
        table: Any = pq.read_table(self.workload.samples / "test")
        of_ad = [name for name in table.column_names if name.startswith("ad_")]
        of_user = [name for name in table.column_names if name not in (*of_ad, "label")]
        ads = {name: table.column(name).combine_chunks().flatten().to_numpy() for name in of_ad}
        return table.select(of_user).to_pylist(), ads


def _bodies(
    users: Sequence[dict[str, Any]], ads: dict[str, Any], candidates: int, count: int, draw: np.random.Generator
) -> Iterator[bytes]:
    for _ in range(count):
        shown = draw.integers(0, len(ads["ad_item"]), candidates)
        columns = {name: values[shown] for name, values in ads.items()}
        request = {"user": users[int(draw.integers(0, len(users)))], "candidates": columns}
        yield orjson.dumps(request, option=orjson.OPT_SERIALIZE_NUMPY)
