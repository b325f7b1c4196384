"""Real logs: ours minus FuxiCTR on the last days, which decide nothing, after some epochs and after the best one.

The days before them say which epoch is the best one. A folder is what tools/real_logs.py has written; its samples are
made once. Both sides have their plain settings.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.quality.compare import SIDES, Bench, Curves, curves, differences, headline, of_goal
from benchmarks.quality.data import JOBS, DataSet
from benchmarks.report import Figure, Section
from benchmarks.seeds import seed_mean
from featurestore.published.versions import open_published
from trainer.errors import DataError
from trainer.samples.columns import files_by_day
from trainer.schema.fields import SCHEMA_FILE

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
    if not (samples / "summary.json").exists():
        options: list[object] = ["--logs", folder, "--mapping", folder / "mapping.yaml", "--samples", samples]
        options += ["--window-days", WINDOW_DAYS, "--test-days", 0]
        command = [sys.executable, str(JOBS / "build_samples.py"), *map(str, options)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    train, validation, left_out = cut_days(samples, train_rows)
    return DataSet(
        name=folder.resolve().name.replace("-", "_"),
        samples=str(samples),
        store=None,
        batch_size=batch_size,
        schema=str(samples / SCHEMA_FILE),
        train_days=train,
        test_days=validation,
        left_out_days=left_out,
    )


def cut_days(samples: Path, train_rows: int | None = None) -> tuple[list[str], list[str], list[str]]:
    """Cut the days of samples into those of training, validation and those left out. Raises DataError."""
    by_day = files_by_day(open_published(str(samples)))
    days = list(by_day)
    counts_D = [sum(_impressions(samples / file) for file in files) for files in by_day.values()]
    before_D = np.r_[0, np.cumsum(counts_D)] / max(1, sum(counts_D))
    last = int(np.searchsorted(before_D, 1 - SHARE, "right")) - 1
    middle = int(np.searchsorted(before_D, before_D[last] - SHARE, "right")) - 1
    if not 0 < middle < last:
        raise DataError(f"{samples} has {len(days)} days; days for training, validation and judging need more of them")
    newest_D = np.cumsum(counts_D[:middle][::-1])
    kept = middle if train_rows is None else max(1, int(np.searchsorted(newest_D, train_rows, "right")))
    return days[middle - kept : middle], days[middle:last], days[last:]


def _impressions(file: Path) -> int:
    labels = pq.read_table(file, columns=["label"], partitioning=None)["label"]
    return int(pc.sum(pc.list_value_length(labels)).as_py() or 0)


def logs_section(bench: Bench) -> list[Section]:
    """Measure both on the days left out, with IDs only."""
    found = curves(replace(bench, tunes=False), images=False)
    goals = [*(f"epoch{epoch}" for epoch in EPOCHS if epoch <= bench.epochs), "best"]
    figures = headline(found, "gauc_left_out", goals, METRIC)
    grid = {f"{data}_{net}": gains(found, data, net, goals) for data, net in dict.fromkeys(key[:2] for key in found)}
    return [
        Section("real logs, days left out: GAUC, ours minus FuxiCTR", figures),
        Section("by log and net, with the GAUC of both at the best epoch", grid=grid, prefix="left_out_"),
    ]


def gains(found: Curves, data: str, net: str, goals: Sequence[str]) -> dict[str, Figure]:
    """Return ours minus theirs of one net, and the figures of both after the epoch that validation chose."""
    cells: dict[str, Figure] = {goal: seed_mean(differences(found, data, goal, METRIC, [net])).mean for goal in goals}
    for side in SIDES:
        cells[f"{side}_best"] = seed_mean([of_goal(curve, "best", METRIC) for curve in found[data, net, side]]).mean
    return cells
