"""The runs of the grid: planned before the first one, made once, found again by all that their figures depend on."""

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from featurestore.console.page import unrecorded
from featurestore.published.paths import FarPath, RunPath
from trainer.comm import Comm
from trainer.config.config import CHANGES_NO_FIGURE, Config, config_digest, load_config
from trainer.errors import CheckpointError, ConfigError, TrainerError
from trainer.experiments.grid import Experiment, Variant
from trainer.experiments.sources import Sources
from trainer.files import checkpoints_of
from trainer.runs.folder import finished, report_of
from trainer.runs.stores import store_places
from trainer.schema import load_schema

METRICS = ("gauc", "auc", "logloss", "new_ad_gauc", "new_ad_auc")
_DIGITS = 10


@dataclass(frozen=True)
class Planned:
    """A run that is to be made or found: its configuration, its folder, and the run that it begins with."""

    config: Config
    folder: RunPath
    warm: "Planned | None"


class Grid:
    """All runs of a call: the settings that they share, under those of the variants, and their folder.

    `semantic_settings`: samples and schema with semantic IDs; None where there are none. Every rank calls the same
    functions, rank 0 alone looks at the runs' folders: on a shared disk the others may see them later.
    """

    def __init__(
        self,
        folder: RunPath,
        file: Path | None,
        settings: tuple[str, ...],
        semantic_settings: tuple[str, ...] | None,
        comm: Comm,
    ) -> None:
        self.folder, self._file, self._settings, self._semantic_settings = folder, file, settings, semantic_settings
        self._comm, self._sources = comm, Sources(comm)
        self._known: dict[Variant, tuple[Config, str]] = {}

    def variants_of(self, experiment: Experiment) -> list[Variant]:
        """List the variants that can be made: without semantic IDs, or of narrow features, not all."""
        return [each for each in experiment.variants if self._can_be_made(each)]

    def plan(self, variant: Variant, seed: int) -> Planned:
        """Plan the variant's run with this seed; it trains nothing and looks at samples and stores.

        Raises TrainerError, FeatureStoreError where the run lacks something.
        """
        warm = None if variant.warm is None else self.plan(variant.warm, seed)
        config, digest = self._looked_up(variant)
        run: dict[str, Any] = {"dir": str(self.folder / "runs"), "name": f"{digest}-seed-{seed}"}
        if warm is not None:
            run["warm_start"] = str(warm.folder)
        return Planned(config.changed(train={"seed": seed}, run=run), self.folder / "runs" / run["name"], warm)

    def facts(self, experiment: Experiment) -> dict[str, dict[str, Any]]:
        """Say what is known of the stores of a table of stores, by variant; nothing of other tables."""
        if not experiment.of_stores:
            return {}
        return {each.name: self._sources.facts(self._looked_up(each)[0]) for each in experiment.variants}

    def figures(self, planned: Planned) -> dict[str, float]:
        """Find the METRICS of the run, which is trained first, from its newest checkpoint, unless that was done before.

        Raises TrainerError, FeatureStoreError, from the run or where it has no GAUC.
        """
        self._make(planned)
        return self._comm.on_rank_0(lambda: _figures_of(planned.folder))

    def _make(self, planned: Planned) -> None:
        from trainer.main import train

        beginning = self._comm.on_rank_0(lambda: self._beginning(planned.folder))
        if beginning is None:
            return
        if planned.warm is not None:
            self._make(planned.warm)
        try:
            with self._log(planned.folder.name) as stream, contextlib.redirect_stdout(stream), unrecorded():
                train(planned.config.changed(run=beginning), self._comm)
        except CheckpointError as failure:
            raise CheckpointError(f"{failure}\nTo train this run anew, remove {planned.folder}") from failure

    @contextlib.contextmanager
    def _log(self, run: str) -> Iterator[IO[str]]:
        """What a run prints, added to its log; at an address, where nothing can be added, the log is that of its last
        start."""
        if self._comm.rank != 0:
            with Path(os.devnull).open("a") as stream:
                yield stream
        elif isinstance(self.folder, FarPath):
            text = io.StringIO()
            try:
                yield text
            finally:
                (self.folder / "logs" / f"{run}.txt").write_bytes(text.getvalue().encode())
        else:
            with (self.folder / "logs" / f"{run}.txt").open("a") as stream:
                yield stream

    def _beginning(self, run: RunPath) -> dict[str, Any] | None:
        """Settings of section run to start with, or to continue from the newest checkpoint; None after its end."""
        try:
            (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise TrainerError(f"--out {self.folder} cannot be used: {failure}; choose another") from failure
        if report_of(run) is not None:
            return None
        goes_on = bool(finished(checkpoints_of(run)))
        return {"resume": "latest" if goes_on else None, "overwrite": not goes_on}

    def _can_be_made(self, variant: Variant) -> bool:
        if variant.reduced is not None:
            return self._reduced(load_config(self._file, [*self._settings, *variant.settings]), variant) is not None
        return self._semantic_settings is not None or not variant.needs_semantic_ids

    def _reduced(self, config: Config, variant: Variant) -> str | None:
        """Give the address of the variant's compact store; None where there can be none."""
        assert variant.reduced is not None
        return self._sources.reduced(config, *variant.reduced, self.folder / "stores")

    def _looked_up(self, variant: Variant) -> tuple[Config, str]:
        """The variant's configuration for every seed, with its days and snapshots, and the digest of its runs."""
        if variant not in self._known:
            self._known[variant] = self._look(variant)
        return self._known[variant]

    def _look(self, variant: Variant) -> tuple[Config, str]:
        semantic = (self._semantic_settings or ()) if variant.needs_semantic_ids else ()
        config = load_config(self._file, [*self._settings, *variant.settings, *semantic])
        config = config.changed(data=self._days(config, variant))
        if variant.reduced is not None:
            config = config.changed(data={"store": self._reduced(config, variant), "store_version": None})
        if config.data.test_days == []:
            raise ConfigError("data.test_days=[] names no test samples, and the tables compare GAUC on them; set some")
        schema = load_schema(config.data.schema_file)
        versions: dict[str, Any] = {"store_versions": dict(config.data.store_versions)}
        stores = {}
        for place in store_places(config, schema):
            snapshot = self._sources.snapshot(place)
            stores[place.name] = snapshot.store_id, snapshot.commit_id
            if place.setting == "data.store":
                versions["store_version"] = snapshot.version
            else:
                versions["store_versions"][place.name] = snapshot.version
        config = config.changed(data=versions)
        depends_on = {
            "config": config.model_dump(mode="json", exclude=CHANGES_NO_FIGURE),
            "schema": schema.model_dump(mode="json"),
            "samples": [self._sources.digest(config, schema, "train"), self._sources.digest(config, schema, "test")],
            "stores": stores,
            "ranks": None if config.exchange.wire_dtype == "float32" else self._comm.size,
            "warm_start": config.run.warm_start if variant.warm is None else self._looked_up(variant.warm)[1],
        }
        return config, config_digest(depends_on)[:_DIGITS]

    def _days(self, config: Config, variant: Variant) -> dict[str, list[str]]:
        """The day before and the days before that, for "previous"; all up to the last one, for "current"."""
        if variant.days == "all":
            return {}
        days = self._sources.days(config.data.samples)
        learnt, tested = (days[:-2], days[-2]) if variant.days == "previous" else (days[1:-1], days[-1])
        return {"train_days": learnt, "test_days": [tested]}


def _figures_of(run: RunPath) -> dict[str, float]:
    """METRICS that are defined, of a finished run. Raises TrainerError without GAUC."""
    report = report_of(run)
    assert report is not None
    metrics = report["metrics"]
    if metrics.get("gauc") is None:
        raise TrainerError(
            f"{run} has no GAUC, which the tables compare: no user of its test samples has impressions with and"
            " without a click; test on more of them (data.test_days, or test/ in data.samples)"
        )
    return {name: float(metrics[name]) for name in METRICS if metrics[name] is not None}
