"""Ours compared with FuxiCTR: the same nets on the same rows, tuned over a small grid, by epoch and by seed.

Of real logs, on the last days, which decide nothing: the days before them say which epoch and which settings are the
best ones. A folder is what tools/real_logs.py or jobs/make_demo_data.py has written; its samples are made once.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from benchmarks.problems import Problem
from benchmarks.quality.data import JOBS, DataSet
from benchmarks.quality.runs import Epoch, Side, Spec, curve_of
from benchmarks.report import Figure, Section
from benchmarks.seeds import seed_mean
from featurestore.parsing import parse_json
from featurestore.published.versions import open_published
from trainer import tune
from trainer.comm import SoloComm
from trainer.errors import DataError
from trainer.samples.columns import files_by_day
from trainer.samples.index import open_index
from trainer.schema.fields import SCHEMA_FILE, load_schema

SIDES: tuple[Side, ...] = ("ours", "fuxictr")
GRIDS: Mapping[Side, Mapping[str, Sequence[Any]]] = {
    "ours": tune.GRID,
    "fuxictr": {"learning_rate": (0.001, 0.002, 0.005, 0.01, 0.02, 0.05), "embedding_regularizer": (0.0, 1e-6)},
}
"""What is tried of each side, each with each: ours what `crossmedia tune` tries; FuxiCTR's its default rate and up to
50 times that, without and with L2 of all ID rows in each step."""
GOALS = {"epoch1": "after the first epoch", "best": "after the best one"}


@dataclass(frozen=True)
class Bench:
    """What all sections share. `settings`: of the trainer, in every run of ours."""

    data: Sequence[DataSet]
    folder: Path
    nets: Sequence[str]
    seeds: Sequence[int]
    epochs: int
    tunes: bool
    progress: Progress
    settings: Mapping[str, Any] = field(default_factory=dict)

    def spec(self, data: DataSet, side: Side, net: str, images: bool) -> Spec:
        """Describe the run of the first seed on all training rows, with the settings as they come."""
        return Spec(
            side=side,
            net=net,
            samples=data.samples,
            store=data.store if images else None,
            schema=data.schema,
            train_days=data.train_days,
            test_days=data.test_days,
            left_out_days=data.left_out_days,
            batch_size=data.batch_size,
            epochs=self.epochs,
            seed=self.seeds[0],
            settings=self.settings if side == "ours" else {},
        )


Curves = Mapping[tuple[str, str, Side], Sequence[Sequence[Epoch]]]
"""By data set, net and side: of each seed, the figures after each epoch."""


def grid_of(side: Side) -> list[dict[str, Any]]:
    """List all combinations of a side's grid."""
    return list(tune.points(GRIDS[side]))


def curves(bench: Bench, images: bool) -> Curves:
    """Return the curves of all data sets, nets and sides, each with the settings that tuning found best."""
    data = [each for each in bench.data if each.store or not images]
    cells = [(each, net, side) for each in data for net in bench.nets for side in SIDES]
    runs = len(bench.seeds) + (max(len(grid_of(side)) for side in SIDES) if bench.tunes else 0)
    task = bench.progress.add_task("with images" if images else "IDs only", total=len(cells) * runs)
    found: dict[tuple[str, str, Side], list[Sequence[Epoch]]] = {}
    for each, net, side in cells:
        bench.progress.update(task, description=f"{each.name}, {net}, {side}{', images' if images else ''}")
        spec = bench.spec(each, side, net, images)
        if bench.tunes:
            spec = tuned(bench, each, spec)
            bench.progress.advance(task, runs - len(bench.seeds))
        for seed in bench.seeds:
            curve = curve_of(replace(spec, seed=seed), bench.folder)
            found.setdefault((each.name, net, side), []).append(curve)
            bench.progress.advance(task)
    check_same_rows(found)
    return found


def tuned(bench: Bench, data: DataSet, spec: Spec) -> Spec:
    """Find the run with the settings of the grid whose best epoch has the highest GAUC on the last training days.

    On the validation days of a real log."""
    held_out = spec
    if not data.left_out_days:
        train_days, test_days = data.tuning_days()
        held_out = replace(spec, train_days=train_days, test_days=test_days)
    tried = [{**spec.settings, **point} for point in grid_of(spec.side)]
    scores = [max(gaucs(curve_of(replace(held_out, settings=each), bench.folder))) for each in tried]
    return replace(spec, settings=tried[int(np.argmax(scores))])


def check_same_rows(found: Curves) -> None:
    """Check that all runs on a data set have measured the same impressions and clicks."""
    for name in {name for name, _, _ in found}:
        counted = {
            (epoch["impressions"], epoch["clicks"], epoch["gauc_impressions"])
            for (other, _, _), seeds in found.items()
            if other == name
            for curve in seeds
            for epoch in curve
        }
        assert len(counted) == 1, f"{name}: the runs measured different rows, {sorted(counted)}"


def gaucs(curve: Sequence[Epoch]) -> list[float]:
    """List the GAUC after each epoch."""
    return [float(epoch["gauc"]) for epoch in curve]


def of_goal(curve: Sequence[Epoch], goal: str, metric: str = "gauc") -> float:
    """Return a metric after epoch N ("epochN"), or after the epoch with the best GAUC of the test rows ("best")."""
    place = int(np.argmax(gaucs(curve))) if goal == "best" else int(goal.removeprefix("epoch")) - 1
    return float(curve[place][metric])


def differences(
    found: Curves, data: str, goal: str, metric: str = "gauc", nets: Sequence[str] | None = None
) -> list[float]:
    """Compute for each seed the mean over nets, by default all, of ours minus theirs."""
    nets = nets or [net for name, net, side in found if name == data and side == "ours"]
    ours, theirs = (
        np.array([[of_goal(curve, goal, metric) for curve in found[data, net, side]] for net in nets]) for side in SIDES
    )
    return [float(value) for value in (ours - theirs).mean(0)]


def headline(found: Curves, prefix: str, goals: Sequence[str], metric: str = "gauc") -> dict[str, Figure]:
    """Return ours minus theirs by data set, with half of the 95 % interval over seeds, the mean and the worst one."""
    figures: dict[str, Figure] = {}
    names = list(dict.fromkeys(name for name, _, _ in found))
    for goal in goals:
        key = f"{prefix}_{goal}"
        means = {name: seed_mean(differences(found, name, goal, metric)) for name in names}
        figures[key] = float(np.mean([each.mean for each in means.values()])) if means else None
        figures[f"{key}_worst"] = min((each.mean for each in means.values()), default=None)
        for name, each in means.items():
            figures[f"{key}_{name}"] = each.mean
            figures[f"{key}_{name}_half_width"] = each.half_width
    return figures


def table(found: Curves, title: str, prefix: str) -> Section:
    """Make a table of means over seeds: GAUC by epoch, the best epoch's, and seconds of an epoch."""
    grid: dict[str, dict[str, Figure]] = {}
    for (name, net, side), seeds in found.items():
        by_epoch = np.mean([gaucs(curve) for curve in seeds], axis=0)
        cells: dict[str, Figure] = {f"epoch{number}": float(gauc) for number, gauc in enumerate(by_epoch, 1)}
        cells["best"] = float(np.mean([of_goal(curve, "best") for curve in seeds]))
        cells["auc_best"] = float(np.mean([max(epoch["auc"] for epoch in curve) for curve in seeds]))
        cells["s_per_epoch"] = float(np.median([epoch["seconds"] for curve in seeds for epoch in curve]))
        grid[f"{name}_{net}_{side}"] = cells
    return Section(title, grid=grid, prefix=prefix)


def ids_section(bench: Bench) -> list[Section]:
    """Measure both with IDs only."""
    found = curves(bench, images=False)
    figures = headline(found, "gauc_vs_fuxictr", list(GOALS))
    return [Section("IDs only: ours minus FuxiCTR", figures), table(found, "IDs only: GAUC", "ids_")]


def images_section(bench: Bench) -> list[Section]:
    """Compare with the images of ads and behaviours: ours trains E, FuxiCTR projects pretrained embeddings."""
    found = curves(bench, images=True)
    figures = headline(found, "gauc_images_vs_fuxictr", list(GOALS))
    figures = {"gauc_images_vs_fuxictr": figures["gauc_images_vs_fuxictr_best"], **figures}
    return [Section("with images: ours minus FuxiCTR", figures), table(found, "with images: GAUC", "images_")]


EPOCHS = (1, 2, 4)
METRIC = "left_out_gauc"
SHARE = 0.1
"""Of all impressions: so many at least are on the days left out, and on the validation days before them."""
WINDOW_DAYS = 3650


def real_log(folder: Path, batch_size: int, train_rows: int | None = None) -> DataSet:
    """Make the samples of a log unless they are there, and cut their days into three parts.

    Training has the newest days of its part with `train_rows` impressions at most, but one day at least.

    Raises subprocess.CalledProcessError, DataError.
    """
    samples = folder / "samples"
    summary = samples / "summary.json"
    if summary.exists() and parse_json(summary.read_bytes())["options"]["window_days"] != WINDOW_DAYS:
        raise DataError(Problem.OTHER_HISTORIES, samples, WINDOW_DAYS)
    if not summary.exists():
        options: list[object] = ["--logs", folder, "--samples", samples, "--window-days", WINDOW_DAYS, "--test-days", 0]
        options += ["--mapping", folder / "mapping.yaml"] if (folder / "mapping.yaml").exists() else []
        command = [sys.executable, str(JOBS / "build_samples.py"), *map(str, options)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    train, validation, left_out = cut_days(samples, train_rows)
    place = folder.resolve()
    named = place.parent if place.name == "logs" else place
    return DataSet(
        name=named.name.replace("-", "_"),
        samples=str(samples),
        store=None,
        batch_size=batch_size,
        schema=schema_of(samples),
        train_days=train,
        test_days=validation,
        left_out_days=left_out,
    )


def cut_days(samples: Path, train_rows: int | None = None) -> tuple[list[str], list[str], list[str]]:
    """Cut the days of samples into those of training, validation and those left out. Raises DataError."""
    by_day = impressions_by_day(samples)
    days, counts_D = list(by_day), list(by_day.values())
    before_D = np.r_[0, np.cumsum(counts_D)] / max(1, sum(counts_D))
    last = int(np.searchsorted(before_D, 1 - SHARE, "right")) - 1
    middle = int(np.searchsorted(before_D, before_D[last] - SHARE, "right")) - 1
    if not 0 < middle < last:
        raise DataError(Problem.TOO_FEW_DAYS, samples, len(days))
    newest_D = np.cumsum(counts_D[:middle][::-1])
    kept = middle if train_rows is None else max(1, int(np.searchsorted(newest_D, train_rows, "right")))
    return days[middle - kept : middle], days[middle:last], days[last:]


def schema_of(samples: Path) -> str | None:
    """Return the schema that build_samples wrote, or None: that of the trainer, as a demo's log has it."""
    return str(samples / SCHEMA_FILE) if (samples / SCHEMA_FILE).exists() else None


def impressions_by_day(samples: Path) -> dict[str, int]:
    """Count the impressions of each day; those of a month may share a file, each in a row group of its own."""
    storage = open_published(str(samples))
    counts = dict.fromkeys(files_by_day(storage), 0)
    index = open_index(SoloComm(), storage, "train", load_schema(schema_of(samples)), [*counts])
    for group in index.row_groups:
        counts[str(group.day)] += group.num_samples
    return counts


def logs_section(bench: Bench) -> list[Section]:
    """Measure both on the days left out, with IDs only: at their plain settings, then tuned."""
    goals = [*(f"epoch{epoch}" for epoch in EPOCHS if epoch <= bench.epochs), "best"]
    sections = []
    for tunes in (False, True)[: 1 + bench.tunes]:
        found = curves(replace(bench, tunes=tunes), images=False)
        title, prefix = ("tuned", "left_out_tuned") if tunes else ("plain settings", "left_out")
        nets = dict.fromkeys(key[:2] for key in found)
        grid = {f"{data}_{net}": gains(found, data, net, goals) for data, net in nets}
        sections += [
            Section(
                f"real logs, days left out, {title}: GAUC, ours minus FuxiCTR",
                headline(found, f"gauc_{prefix}", goals, METRIC),
            ),
            Section(
                f"{title}: by log and net, with the GAUC of both at the best epoch", grid=grid, prefix=f"{prefix}_"
            ),
        ]
    return sections


def gains(found: Curves, data: str, net: str, goals: Sequence[str]) -> dict[str, Figure]:
    """Return ours minus theirs of one net, and the figures of both after the epoch that validation chose."""
    cells: dict[str, Figure] = {goal: seed_mean(differences(found, data, goal, METRIC, [net])).mean for goal in goals}
    for side in SIDES:
        cells[f"{side}_best"] = seed_mean([of_goal(curve, "best", METRIC) for curve in found[data, net, side]]).mean
    return cells
