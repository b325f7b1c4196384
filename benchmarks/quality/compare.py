"""Ours compared with FuxiCTR: the same nets on the same rows, tuned over a small grid, by epoch and by seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from benchmarks.quality.data import DataSet
from benchmarks.quality.runs import Epoch, Side, Spec, curve_of
from benchmarks.report import Figure, Section
from benchmarks.seeds import seed_mean
from trainer import tune

SIDES: tuple[Side, ...] = ("ours", "fuxictr")
GRIDS: Mapping[Side, Mapping[str, Sequence[Any]]] = {
    "ours": tune.GRID,
    "fuxictr": {"learning_rate": (0.001, 0.002), "embedding_regularizer": (0.0, 1e-6)},
}
"""What is tried of each side, each with each: ours what `crossmedia tune` tries; FuxiCTR's its default rate and twice
that, without and with L2 of all ID rows in each step."""
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
    """Find the run with the settings of the grid whose best epoch has the highest GAUC on the last training days."""
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
    """Return ours minus theirs by data set, with half of the 95 % interval over seeds, and the worst data set's."""
    figures: dict[str, Figure] = {}
    names = list(dict.fromkeys(name for name, _, _ in found))
    for goal in goals:
        key = f"{prefix}_{goal}"
        means = {name: seed_mean(differences(found, name, goal, metric)) for name in names}
        figures[key] = min((each.mean for each in means.values()), default=None)
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
