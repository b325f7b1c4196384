"""One run of the grid: made once, found again by its settings, one after the other in this process."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from featurestore.storage import Storage
from trainer.comm import Comm
from trainer.config import load_config
from trainer.days import files_by_day
from trainer.errors import DataError
from trainer.experiments.grid import Variant

METRICS = ("gauc", "auc", "logloss", "new_ad_gauc", "new_ad_auc")
_DIGITS = 10


@dataclass(frozen=True)
class Grid:
    """What all runs share: the settings under those of the variants, and where the runs are kept."""

    folder: Path
    file: Path | None
    settings: tuple[str, ...]
    semantic_settings: tuple[str, ...] | None
    """Samples and schema with semantic IDs; None where there are none."""

    def measure(self, variant: Variant, seed: int, comm: Comm) -> dict[str, float]:
        """METRICS of the variant's run with this seed; trained now, unless that was done before. Every rank calls it.

        Raises TrainerError, FeatureStoreError, from the run.
        """
        warm = () if variant.warm is None else (f"run.warm_start={self._trained(variant.warm, seed, comm)}",)
        report = json.loads((self._trained(variant, seed, comm, warm) / "report.json").read_text())
        return {name: float(report["metrics"][name]) for name in METRICS if report["metrics"].get(name) is not None}

    def _trained(self, variant: Variant, seed: int, comm: Comm, more: Sequence[str] = ()) -> Path:
        """Folder of the finished run."""
        from trainer.main import train

        settings = [*self.settings, *self._days(variant), *variant.settings, *more, f"train.seed={seed}"]
        if variant.needs_semantic_ids:
            settings += self.semantic_settings or ()
        name = self._name(variant, settings, seed)
        run = self.folder / "runs" / name
        if not (run / "report.json").is_file():
            config = load_config(
                self.file, [*settings, f"run.dir={self.folder / 'runs'}", f"run.name={name}", "run.overwrite=true"]
            )
            (self.folder / "logs").mkdir(parents=True, exist_ok=True)
            with (self.folder / "logs" / f"{name}.txt").open("w") as log, contextlib.redirect_stdout(log):
                train(config, comm)
        return run

    def _name(self, variant: Variant, settings: Sequence[str], seed: int) -> str:
        """Equal settings share a run, whichever table asks for it; the variant's name is there for people."""
        config = load_config(self.file, settings).model_dump(mode="json")
        for name in ("dir", "name", "overwrite", "threads", "warm_start"):  # they change no number
            config["run"].pop(name)
        config["data"].pop("cache_dir")
        text = json.dumps([config, variant.warm is not None], sort_keys=True)
        return f"{hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]}-seed-{seed}"

    def _days(self, variant: Variant) -> list[str]:
        """The day before and the days before that, for "previous"; all up to the last one, for "current"."""
        if variant.days == "all":
            return []
        config = load_config(self.file, self.settings)
        days = list(files_by_day(Storage(config.data.samples)))
        if len(days) < 3:
            raise DataError(
                f"data.samples={config.data.samples} has {len(days)} days of samples; warm-up from the day before needs"
                " 3 at least, in files that begin with day=2026-01-31 (jobs/build_samples.py writes them)"
            )
        learnt, tested = (days[:-2], days[-2]) if variant.days == "previous" else (days[1:-1], days[-1])
        return [f"data.train_days=[{','.join(learnt)}]", f"data.test_days=[{tested}]"]
