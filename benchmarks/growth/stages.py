"""The stages from logs to exported vectors, as the commands that a person runs, each measured as a whole."""

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.growth.logs import Shop
from benchmarks.process import run_to_end

SAMPLES_ALONE = "samples"
_RANKS = 2


@dataclass(frozen=True)
class Stage:
    """What one stage took, the start of its programs included."""

    seconds: float
    memory_mb: float
    """The most that its processes had at one moment, without pages of mapped files."""
    written_mb: float


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
            peak = max((each.anonymous for each in memory), default=0)
            yield name, Stage(seconds, peak / 1e6, _bytes_of(path) / 1e6)
            if samples_alone and name == SAMPLES_ALONE:
                return

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
            f"model.tables={{user: {rows}, item: {rows}, image: {rows}, category: 4096, scene: 256}}",
            f"run.dir={self.folder / 'runs'}",
            "run.name=growth",
            "run.overwrite=true",
            "run.device=cpu",
        ]


def _bytes_of(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(each.stat().st_size for each in files if each.is_file())
