"""The runs of the benchmark: what settings each one gets, how it is started, and where its figures are kept.

A run that ended is not made again: its figures lie in OUT/figures under a digest of all that they depend on.
"""

import contextlib
import hashlib
import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.problems import Problem
from benchmarks.process import fuxictr_python
from featurestore.console.files import write_json
from featurestore.errors import UserError
from featurestore.store import FeatureStore
from trainer.comm import SoloComm
from trainer.config import Config, load_config
from trainer.evaluation.bootstrap import measure
from trainer.evaluation.predict import predict_run
from trainer.loop.summary import ProgressLog
from trainer.loop.training import StopSignals, Training, total_steps
from trainer.runs.open import claim_folder, open_run
from trainer.samples.index import open_index
from trainer.schema.fields import IDS_LR_ALONE, load_schema

Side = Literal["ours", "fuxictr"]
Epoch = Mapping[str, Any]
"""Metrics of the test rows after an epoch, as trainer.evaluation names them, and the `seconds` of its training; after
the last one `judged_…`, where the run has such samples."""
EXACT_TABLE = "{kind: exact, max_rows: 1048576}"
"""Our ID tables: every id has a row of its own, as with FuxiCTR and in the settings of samples."""
_BASES = {"dnn": "mlp", "dcnv2": "dcn"}
_DIGITS = 16


class QualityRunError(UserError):
    """A run failed; the text has its last lines."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One run. `settings`: of the trainer by name, or arguments of FuxiCTR's class. Without a store: without images.
    `judged`: samples on whose new ads a run of ours is measured once it is trained. Where there are
    `left_out_days`, the test days are those by which rates fall; those left out are measured and decide nothing."""

    side: Side
    net: str
    samples: str
    judged: str | None = None
    store: str | None = None
    schema: str | None = None
    train_days: Sequence[str] | None = None
    test_days: Sequence[str] | None = None
    left_out_days: Sequence[str] | None = None
    batch_size: int
    epochs: int
    seed: int
    width: int = 12
    hidden: Sequence[int] = (200, 80)
    threads: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """Compute a name of the run from its settings and, roughly, from what its samples and store hold."""
        schema = load_schema(self.schema)
        pairs = (("train", self.train_days), ("test", self.test_days))
        samples = [open_index(SoloComm(), self.samples, split, schema, days).layout_digest for split, days in pairs]
        snapshot = None if self.store is None else FeatureStore.open(self.store).snapshot()
        commit = None if snapshot is None else snapshot.manifest.commit_id
        if self.judged:
            samples.append(open_index(SoloComm(), self.judged, "test", schema).layout_digest)
        if self.left_out_days:
            samples.append(open_index(SoloComm(), self.samples, "test", schema, self.left_out_days).layout_digest)
        places = ("samples", "judged", "store", "threads", "left_out_days")
        described = {name: value for name, value in asdict(self).items() if name not in places}
        depends_on: list[Any] = [described, samples, commit]
        if self.side == "ours":  # the defaults too
            config = load_config(None, [f"{name}={value}" for name, value in ours_settings(self).items()])
            depends_on.append({section: config.model_dump(mode="json")[section] for section in ("model", "optim")})
        return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def curve_of(spec: Spec, folder: Path) -> list[Epoch]:
    """Return the figures after each epoch, of a run that is made now unless it was before. Raises QualityRunError."""
    name = f"{spec.side}-{spec.net}-{spec.digest()}"
    kept = folder / "figures" / f"{name}.json"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        curve = run_spec(spec, folder / "runs", name)
        write_json(kept, {"spec": asdict(spec), "curve": curve})
    return list(json.loads(kept.read_text())["curve"])


def run_spec(spec: Spec, runs: Path, name: str) -> list[Epoch]:
    """Make a run, whose files lie in `runs` meanwhile, and return its figures. Raises QualityRunError."""
    return _ours(spec, runs, name) if spec.side == "ours" else _fuxictr(spec, runs, name)


def ours_settings(spec: Spec) -> dict[str, Any]:
    """List all settings of a run of ours, over the preset."""
    schema = load_schema(spec.schema)
    index = open_index(SoloComm(), spec.samples, "train", schema, spec.train_days)
    days = {"train_days": spec.train_days, "test_days": spec.test_days}
    if spec.left_out_days:
        validation = list(spec.test_days or [])
        days = {"train_days": [*(spec.train_days or []), *validation], "test_days": spec.left_out_days}
        days["validation_days"] = validation
    settings: dict[str, Any] = {
        "data.samples": spec.samples,
        "data.global_batch_size": spec.batch_size,
        "model.base": _BASES.get(spec.net, spec.net),
        "model.images": "both" if spec.store else "none",
        "model.id_width": spec.width,
        "model.mlp": f"[{','.join(str(units) for units in spec.hidden)}]",
        "train.epochs": spec.epochs,
        "train.eval_every": -(-index.num_samples // spec.batch_size),
        "train.seed": spec.seed,
        "train.log_every": 1_000_000,
        "train.checkpoint_every": "null",
        "run.threads": spec.threads,
        **{f"data.{name}": f"[{','.join(value)}]" for name, value in days.items() if value is not None},
        **{f"model.tables.{field.table_name}": EXACT_TABLE for field in schema.of_kind("id", "multi_id")},
    }
    settings |= {"data.store": spec.store} if spec.store else {"optim.ids_lr": IDS_LR_ALONE}
    settings |= {"data.schema_file": spec.schema} if spec.schema else {}
    return settings | dict(spec.settings)


def _ours(spec: Spec, runs: Path, name: str) -> list[Epoch]:
    settings = {**ours_settings(spec), "run.dir": runs, "run.name": name, "run.overwrite": "true"}
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / f"{name}.txt").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        curve = _trained(load_config(None, [f"{setting}={value}" for setting, value in settings.items()]))
    (runs / f"{name}.txt").unlink()
    judged = _of_new_ads(runs / name, spec.judged) if spec.judged else {}
    shutil.rmtree(runs / name)
    return [*curve[:-1], {**curve[-1], **judged}]


class _Watched(Training):
    """Measures the days left out after each evaluation on the validation days as well."""

    def evaluate(self) -> None:
        super().evaluate()
        if self._run.validation_reader is not None:
            deciding, self._measured_reader = self._measured_reader, self._run.test_reader
            metrics, _ = self._measured()
            self._run.history[-1] |= {f"left_out_{name}": value for name, value in metrics.items()}
            self._measured_reader = deciding


def _trained(config: Config) -> list[Epoch]:
    """Train a run, and return what each of its evaluations found."""
    with contextlib.closing(open_run(config, SoloComm())) as run, StopSignals() as signals:
        claim_folder(run)
        with ProgressLog(None, 0, total_steps(run)) as progress:
            training = _Watched(run, progress, signals)
            training.fit()
        seconds = training.totals.step_seconds / config.train.epochs
        return [{**entry, "seconds": seconds} for entry in run.history]


def _of_new_ads(run: Path, samples: str) -> Epoch:
    found = predict_run(run, samples=samples)
    new_N, rows = found.is_new_ad_N, found.impressions
    assert new_N is not None  # the run's own training samples are there
    label_N = rows.label_N[new_N].astype(np.float64)
    return measure(found.logit_N[new_N], label_N, rows.user_N[new_N], "judged_")


def _fuxictr(spec: Spec, runs: Path, name: str) -> list[Epoch]:
    runs.mkdir(parents=True, exist_ok=True)
    described, found = runs / f"{name}.json", runs / f"{name}-result.json"
    described.write_text(json.dumps(asdict(spec)))
    _run([str(fuxictr_python()), "-m", "benchmarks.quality.fuxi", str(described), str(found)], name)
    curve: list[Epoch] = json.loads(found.read_text())["curve"]
    described.unlink()
    found.unlink()
    return curve


def _run(command: Sequence[str], name: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise QualityRunError(Problem.ENDED, name, done.returncode, (done.stderr or done.stdout)[-2000:])
