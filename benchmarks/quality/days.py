"""Day after day: the daily command, alone and with --continue, against a training on all days.

Each way ends with a run for every judged day, which is measured on the day after it. A log of many days is cut into
`PERIODS` of equally many impressions first, each named by its last day.
"""

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.compare import Bench
from benchmarks.quality.data import DataSet
from benchmarks.report import Figure, Section
from benchmarks.seeds import seed_mean
from featurestore.console.files import write_json
from featurestore.published.versions import open_published
from trainer.comm import SoloComm
from trainer.config.config import Config, load_config
from trainer.daily import follow
from trainer.main import train
from trainer.samples.columns import files_by_day

PERIODS, MANY_DAYS = 15, 30
MEASURED = (-5, -3, -1)
"""Places of the days that runs are measured on. The first run of the daily command has all days before the first."""
METRICS = ("gauc", "logloss")
Metrics = Mapping[str, float]


WAYS = ("all_days", "daily", "daily_continue")


def days_section(bench: Bench) -> list[Section]:
    """Measure GAUC and log loss of the next day."""
    task = bench.progress.add_task("day after day", total=len(WAYS) * len(bench.data) * len(bench.seeds))
    figures: dict[str, Figure] = {}
    grid: dict[str, dict[str, Figure]] = {}
    for data in (by_period(each, bench.folder) for each in bench.data):
        found: dict[str, list[Metrics]] = {}
        for way in WAYS:
            for seed in bench.seeds:
                bench.progress.update(task, description=f"{data.name}, {way}, seed {seed}")
                found.setdefault(way, []).append(_kept(bench, data, way, seed))
                bench.progress.advance(task)
        for metric in METRICS:
            for way, seeds in found.items():
                grid.setdefault(f"{data.name}_{way}", {})[metric] = seed_mean([each[metric] for each in seeds]).mean
            for way in WAYS[1:]:
                pairs = zip(found[way], found["all_days"], strict=True)
                gain = seed_mean([mine[metric] - whole[metric] for mine, whole in pairs])
                key = f"{metric}_{way}_minus_all_days_{data.name}"
                figures |= {key: gain.mean, f"{key}_half_width": gain.half_width}
    return [Section("day after day: the next day's GAUC and log loss", figures, grid)]


def _kept(bench: Bench, data: DataSet, way: str, seed: int) -> Metrics:
    """Return the mean over the measured days, of runs that are made now unless they were before."""
    spec = bench.spec(data, "ours", "dnn", images=data.store is not None)
    kept = bench.folder / "figures" / f"days-{data.name}-{way}-{seed}-{spec.digest()}.json"
    if not kept.exists():
        folder = bench.folder / "runs" / f"days-{data.name}-{way}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with (folder / "log.txt").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            by_day = _run(bench, data, way, seed, folder)
        shutil.rmtree(folder)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, by_day)
    by_day = json.loads(kept.read_text())
    return {metric: float(np.mean([each[metric] for each in by_day.values()])) for metric in METRICS}


def _run(bench: Bench, data: DataSet, way: str, seed: int, folder: Path) -> Mapping[str, Metrics]:
    """Return the metrics of each measured day."""
    days = list(files_by_day(open_published(data.samples)))
    measured = [days[place] for place in MEASURED]
    base = load_config(None, [f"{name}={value}" for name, value in _settings(bench, data, seed, folder).items()])
    if way == "all_days":
        return {day: _train(base, day, days[: days.index(day)]) for day in measured}
    last = days[days.index(measured[0]) - 1]
    follow(base, SoloComm(), first=last, last=days[-2], continues=way == "daily_continue")
    rows = json.loads((folder / "daily" / "days.json").read_text())
    return {row["test_day"]: row for row in rows if row["test_day"] in measured}


def _train(config: Config, test_day: str, train_days: Sequence[str]) -> Metrics:
    days = {"train_days": list(train_days), "test_days": [test_day]}
    train(config.changed(run={"name": test_day}, data=days), SoloComm())
    return dict(json.loads((Path(config.run.dir) / test_day / "report.json").read_text())["metrics"])


def _settings(bench: Bench, data: DataSet, seed: int, folder: Path) -> Mapping[str, Any]:
    store = {"data.store": data.store, "data.missing": "zeros"} if data.store else {"model.images": "none"}
    return {
        "data.samples": data.samples,
        **store,
        "data.global_batch_size": data.batch_size,
        "train.seed": seed,
        "train.log_every": 1_000_000,
        "train.checkpoint_every": "null",
        "train.checkpoint_every_s": "null",
        "run.dir": folder,
        "run.threads": 1,
        **bench.settings,
    }


def by_period(data: DataSet, folder: Path) -> DataSet:
    """Cut samples of many days into periods, as files named by the last day of each, unless they are there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    by_day = files_by_day(open_published(data.samples))
    if len(by_day) <= MANY_DAYS:
        return data
    out = folder / "periods" / data.name
    if not out.exists():
        part = out.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        (part / "train").mkdir(parents=True)
        tables = {
            day: pa.concat_tables([pq.read_table(Path(data.samples) / file, partitioning=None) for file in files])
            for day, files in by_day.items()
        }
        end_D = np.cumsum(
            [sum(len(row or ()) for row in table.column("label").to_pylist()) for table in tables.values()]
        )
        period_D = np.minimum((end_D * PERIODS - 1) // end_D[-1], PERIODS - 1)
        for period in np.unique(period_D):
            own = [day for day, of in zip(tables, period_D.tolist(), strict=True) if of == period]
            merged = pa.concat_tables([tables[day] for day in own])
            pq.write_table(merged, part / "train" / f"day={own[-1]}.parquet", row_group_size=2048)
        part.rename(out)
    return DataSet(data.name, str(out), data.store, data.batch_size)
