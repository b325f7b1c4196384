"""The runs that are compared: undisturbed ones of several numbers of ranks, killed ones, and what they end with."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from benchmarks.resume.worker import DIES, train
from benchmarks.workload import Workload
from trainer.comm import SoloComm
from trainer.config.config import load_config
from trainer.errors import TrainerError
from trainer.evaluation.predict import predict_run
from trainer.ids.optimizers import SHARED_STATE
from trainer.runs.checkpoint import DENSE, read_state
from trainer.runs.folder import find_checkpoint

Float = NDArray[np.float64]
CHANGING = (4, 1, 2)
"""Ranks of a run that continues with another number after each kill, in turn."""
_TABLE_ROWS, _TABLE_SHARDS = 256, 8


@dataclass(frozen=True)
class End:
    """What a run ends with: parameters that all ranks hold, rows of IDs, and logits of the test samples (N,)."""

    dense: dict[str, Float]
    rows: dict[str, Float]
    logit_N: Float
    label_N: NDArray[np.float32]

    @property
    def log_loss(self) -> float:
        """Mean over the test samples."""
        return float(np.mean(np.logaddexp(0, self.logit_N) - self.label_N * self.logit_N))


@dataclass(frozen=True)
class Runs:
    """Makes runs of `steps` steps with model.compute_dtype=`dtype`; each is removed at its end."""

    workload: Workload
    scratch: Path
    dtype: str
    steps: int

    def alone(self, *settings: str, nudged: bool = False) -> End:
        """Train on one rank, in this process."""
        train(load_config(self.workload.config, self._settings(*settings)), SoloComm(), nudged=nudged)
        return _end(self._folder)

    def on_ranks(self, *ranks: int, kills: Sequence[int] = ()) -> End:
        """Begin with ranks[0], kill in the midst of step kills[0], resume with ranks[1], and so on, in turn."""
        for number, die_at in enumerate([*kills, None]):
            resume = ["run.resume=latest"] if number else []
            self._ranks(ranks[number % len(ranks)], die_at, self._settings(*resume))
        return _end(self._folder)

    @property
    def _folder(self) -> Path:
        """Of the run that is being made."""
        return self.scratch / "run"

    def _settings(self, *more: str) -> list[str]:
        """Of every run: as the preset, but small, and with all that is left to the machine said."""
        tables = load_config(self.workload.config).model.tables
        changes = {
            "model.compute_dtype": self.dtype,
            "model.pooling": "attentive",
            "model.table_shards": _TABLE_SHARDS,
            **{f"model.tables.{table}": _TABLE_ROWS for table in tables},
            "train.epochs": 1000,
            "train.max_steps": self.steps,
            "train.checkpoint_every": checkpoint_every(self.steps),
            "train.checkpoint_beside": "false",  # kills know how far they come after one
            "run.dir": self._folder.parent,
            "run.name": self._folder.name,
            "run.threads": 1,
        }
        return [*(f"{field}={value}" for field, value in changes.items()), *more]

    def _ranks(self, count: int, die_at: int | None, settings: Sequence[str]) -> None:
        """Run a number of ranks to the end or until the last one dies. Raises TrainerError where they end otherwise."""
        module = ["trainer.main"] if die_at is None else ["benchmarks.resume.worker", "--die-at", str(die_at)]
        launcher = [str(Path(sys.executable).with_name("horovodrun")), "-np", str(count)] if count > 1 else []
        command = [*launcher, sys.executable, "-m", *module, "--config", str(self.workload.config), *settings]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        as_planned = done.returncode == 0 if die_at is None else DIES in done.stdout
        if not as_planned:
            raise TrainerError(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-3000:]}")


def checkpoint_every(steps: int) -> int:
    """Choose the number of steps between two checkpoints of a run of that length."""
    return max(2, steps // 20)


def _end(folder: Path) -> End:
    """Of a run, whose folder is removed."""
    checkpoint = find_checkpoint(folder)
    tensors = {file: load(checkpoint.read_bytes(file)) for file in read_state(checkpoint).files}
    dense = {name: value for name, value in tensors.pop(DENSE).items() if _is_parameter(name)}
    rows = {name: value for of in tensors.values() for name, value in of.items() if name.endswith("/weight")}
    predicted = predict_run(folder)
    shutil.rmtree(folder)
    return End(dense, rows, predicted.logit_N, predicted.impressions.label_N)


def _is_parameter(name: str) -> bool:
    """Neither an optimiser's state, nor standardisation, nor the number of steps."""
    return not name.startswith(("adam/", SHARED_STATE)) and not name.endswith("_D") and name != "num_steps"
