"""The runs of the tables, and their figures: means with intervals, and gains over the baseline, paired by seed.

Runs are planned before the first one, made once, and found again by all that their figures depend on.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from benchmarks.problems import Problem
from benchmarks.report import Figure, Section
from benchmarks.seeds import holm, p_value, seed_mean
from benchmarks.tables.variants import Table, Variant
from featurestore.console.output import print_line, text_console
from featurestore.published.versions import open_published
from featurestore.spec import flat
from featurestore.store import FeatureStore, SnapshotId
from trainer.comm import Comm
from trainer.config import Config, load_config, read_mapping, settings_that_decide
from trainer.errors import DataError, DataNotFoundError, TrainerError
from trainer.runs.folder import report_of
from trainer.runs.open import StorePlace, missing_places, store_places
from trainer.samples.columns import files_by_day
from trainer.samples.index import open_index
from trainer.samples.survey import samples_digest
from trainer.schema.fields import Schema, load_schema

METRICS = ("gauc", "auc", "new_ad_auc", "new_ad_gauc", "logloss")
_DIGITS = 10
_LEAST_DAYS = 3
Found = TypeVar("Found")


@dataclass(frozen=True)
class Planned:
    """A run that is to be made or found: its configuration, its folder, and the run that it begins with."""

    config: Config
    folder: Path
    warm: "Planned | None"


class Runner:
    """All runs of a call, in `folder`. Every rank calls the same functions; all raise together.

    `file` and `settings` are those of every run, below those of tables and variants. Days, samples and snapshots are
    looked at once, so all runs of a call see the same.
    """

    def __init__(self, folder: Path, file: Path | None, settings: tuple[str, ...], comm: Comm) -> None:
        self._folder, self._file, self._settings, self._comm = folder, file, settings, comm
        self._seen: dict[Any, Any] = {}

    def plan(self, table: Table, variant: Variant, seed: int) -> Planned:
        """Plan the variant's run with this seed; it trains nothing and looks at samples and stores.

        Raises TrainerError, FeatureStoreError where the run lacks something.
        """
        warm = None if variant.warm_start is None else self.plan(table, variant.warm_start, seed)
        config, digest = self._pinned(table, variant, warm)
        run = {"dir": str(self._folder / "runs"), "name": f"{digest}-seed-{seed}", "resume": "auto"}
        if warm is not None:
            run["warm_start"] = str(warm.folder)
        return Planned(config.changed(train={"seed": seed}, run=run), self._folder / "runs" / run["name"], warm)

    def metrics(self, planned: Planned) -> dict[str, float]:
        """Find the METRICS of the run, which is trained first, from its newest checkpoint, unless that was done before.

        Raises TrainerError, FeatureStoreError, from the run or where it has no GAUC.
        """
        self._make(planned)
        return self._comm.on_rank_0(lambda: _metrics_of(planned.folder))

    def _make(self, planned: Planned) -> None:
        from trainer.main import train

        if self._comm.on_rank_0(lambda: self._is_made(planned)):
            return
        if planned.warm is not None:
            self._make(planned.warm)
        log = self._folder / "logs" / f"{planned.folder.name}.txt" if self._comm.rank == 0 else Path(os.devnull)
        with log.open("a") as stream, contextlib.redirect_stdout(stream):
            Context().run(train, planned.config, self._comm)  # without the page of this command

    def _is_made(self, planned: Planned) -> bool:
        try:
            (self._folder / "logs").mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise TrainerError(Problem.FOLDER_UNUSABLE, self._folder, failure) from failure
        return report_of(planned.folder) is not None

    def _pinned(self, table: Table, variant: Variant, warm: Planned | None) -> tuple[Config, str]:
        """The variant's configuration for every seed, with its days and snapshots, and the digest of its run."""
        laid = flat(read_mapping(variant.config, "", TrainerError)) if variant.config else ()
        over = [f"{name}={value}" for name, value in [*table.settings.items(), *laid, *variant.settings.items()]]
        config = load_config(self._file, [*self._settings, *over])
        config = config.changed(data=self._days(config, variant))
        data, schema = config.data, load_schema(config.data.schema_file)
        versions: dict[str, Any] = {"store_versions": dict(data.store_versions)}
        stores = []
        for place in store_places(config, schema):
            snapshot = self._snapshot(place)
            stores.append((place.name, snapshot.store_id, snapshot.commit_id))
            if place.setting == "data.store":
                versions["store_version"] = snapshot.version
            else:
                versions["store_versions"][place.name] = snapshot.version
        config = config.changed(data=versions)
        no_figure = settings_that_decide("nothing")
        no_figure["train"].add("seed")  # which changes figures by chance alone
        no_figure["run"].add("warm_start")  # compared below
        depends_on = {
            "config": config.model_dump(mode="json", exclude=no_figure),
            "schema": schema.model_dump(mode="json"),
            "samples": [self._samples(config, schema, split) for split in ("train", "test")],
            "stores": stores,
            "warm_start": config.run.warm_start if warm is None else warm.folder.name,
        }
        digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
        return config, digest[:_DIGITS]

    def _samples(self, config: Config, schema: Schema, split: str) -> str:
        """The digest of the files that a run learns from, or is tested on: of names, counts and bytes."""
        data = config.data
        days = data.train_days if split == "train" else data.test_days

        def look() -> str:
            index = open_index(self._comm, data.samples, split, schema, days)
            return samples_digest(self._comm, index, data.cache_dir)

        return self._once((data.samples, split, data.schema_file, str(days)), look)

    def _snapshot(self, place: StorePlace) -> SnapshotId:
        def look() -> SnapshotId:
            if problems := missing_places([place]):
                raise DataNotFoundError("\n".join(problems))
            return SnapshotId.of(FeatureStore.open(place.url).snapshot(place.version))

        return self._once(place, lambda: self._comm.on_rank_0(look))

    def _days(self, config: Config, variant: Variant) -> dict[str, list[str]]:
        """The days to learn and the day to be tested on: one window of days, which "current" moves on by a day."""
        if variant.days == "all":
            return {}
        samples = config.data.samples
        days = self._once(samples, lambda: self._comm.on_rank_0(lambda: list(files_by_day(open_published(samples)))))
        if len(days) < _LEAST_DAYS:
            raise DataError(Problem.TOO_FEW_TO_WARM_UP, samples, len(days), _LEAST_DAYS)
        window = days[:-1] if variant.days == "previous" else days[1:]
        return {"train_days": window[:-1], "test_days": window[-1:]}

    def _once(self, key: Any, look: Callable[[], Found]) -> Found:
        if key not in self._seen:
            self._seen[key] = look()
        return cast("Found", self._seen[key])


def _metrics_of(run: Path) -> dict[str, float]:
    """METRICS that are defined, of a finished run. Raises TrainerError without GAUC."""
    report = report_of(run)
    assert report is not None
    metrics = report["metrics"]
    if metrics.get("gauc") is None:
        raise TrainerError(Problem.NO_GAUC, run)
    return {name: float(metrics[name]) for name in METRICS if metrics[name] is not None}


def make_sections(tables: Mapping[str, Table], seeds: Sequence[int], runner: Runner, comm: Comm) -> list[Section]:
    """Run what is missing, and return the tables. Every rank calls it.

    Raises TrainerError, FeatureStoreError; what any of the runs lacks, before the first one.
    """
    console = text_console(quiet=comm.rank != 0)
    planned = {
        name: [(row, [runner.plan(table, variant, seed) for seed in seeds]) for row, variant in table.variants.items()]
        for name, table in tables.items()
    }
    sections = []
    for name, rows in planned.items():
        metrics: dict[str, list[Mapping[str, float]]] = {}
        for row, runs in rows:
            for seed, run in zip(seeds, runs, strict=True):
                metrics.setdefault(row, []).append(runner.metrics(run))
                print_line(console, f"{name}: {row}, seed {seed}: GAUC {metrics[row][-1]['gauc']:.4f}")
        sections.append(section_of(name, tables[name], metrics))
    return sections


def section_of(name: str, table: Table, metrics: Mapping[str, Sequence[Mapping[str, float]]]) -> Section:
    """Make a table from the metrics of each variant, one mapping for each seed in the same order.

    `gauc_95` and `gain_95` are half the widths of 95 % intervals; `p` is of the paired t test, corrected for its rows.
    """
    gauc = {row: [run["gauc"] for run in runs] for row, runs in metrics.items()}
    gains = {
        row: [ours - theirs for ours, theirs in zip(gauc[row], gauc[table.baseline_of(row)], strict=True)]
        for row in gauc
        if row != table.baseline_of(row)
    }
    p_values = holm({row: p_value(each) for row, each in gains.items()})
    grid: dict[str, dict[str, Figure]] = {}
    for row, runs in metrics.items():
        cells = grid[row] = {}
        for column, values in (("gauc", gauc[row]), ("gain", gains.get(row))):
            if values:
                found = seed_mean(values)
                cells |= {column: found.mean, f"{column}_95": found.half_width}
        cells |= {"p": p_values[row]} if row in p_values else {}
        for metric in METRICS[1:]:
            if all(metric in run for run in runs):
                cells[metric] = seed_mean([run[metric] for run in runs]).mean
        if (paper := table.variants[row].paper_gauc) is not None:
            cells["paper_gauc"] = paper
    num_seeds = len(next(iter(gauc.values())))
    return Section(f"{table.title} ({name}); {num_seeds} seed{'s' * (num_seeds > 1)}", grid=grid, prefix=f"{name}_")
