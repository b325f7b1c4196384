"""Measure this machine by short runs of the trainer on a part of the samples; the figures are those of their reports.

For L ranks on a machine, L runs of one rank each go at the same time: the machine is as full as it will be, and no wire
is in their stages. What a collective costs is measured apart, on ranks of its own.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from featurestore import FeatureRows, FeatureStore, StoreInfo, to_bits
from featurestore.lookup.partition import physical_memory_bytes
from trainer.comm.connecting import launcher_of
from trainer.config.config import Config, save_config
from trainer.config.options import TableConfig
from trainer.engine.machine import check_threads
from trainer.errors import PlanError
from trainer.exchange.routing import Int64
from trainer.plan.cost import Machine, NetworkSpeed, StageCost, StageRate, StageRates, step_seconds
from trainer.plan.sample import LARGEST_MEASURED, PlanQuestion, SampledKeys
from trainer.samples.columns import rules_of, source_columns
from trainer.samples.days import name_of
from trainer.samples.reader import read_row_group
from trainer.stages import AHEAD, WAIT

_STEPS = 15
_TIMEOUT_S = 300
_MOST_PROCESSES = 8
_MOST_JITTER = 0.1
_MOST_TABLE_ROWS = 1 << 20
_STORE_OF_MEMORY, _STANDIN_OF_MEMORY = 0.25, 0.05
_SHARDS, _ROWS_A_PUT = 8, 8_192
# Stages of the report that make a piece of the plan; "worker" is all others of the step, and "read" was timed before.
_STAGES: Mapping[str, tuple[str, ...]] = {
    "route": ("unique", "exchange keys", "exchange signatures", "compare images"),
    "gather": ("gather",),
    "embed": ("embed images", "embed backward"),
    "rows": ("update id rows",),
}
_PIECES = ("route", "gather", "embed", "worker", "rows")


class TimedSteps(NamedTuple):
    """Runs of one size: units of work and seconds of each piece of a step, cores busy meanwhile, and the whole step."""

    units: dict[str, float]
    seconds: dict[str, float]
    cores: float
    step_s: float
    spread: float


class Calibration:
    """This machine with one rank on it, or with several. Raises PlanError with what a run said that failed.

    There are as many runs at a time as ranks, but no more than cores; ranks beyond that share the cores by turns. A
    measurement takes about half a minute; `folder` gets the samples, the runs, and a store in the place of a large one.
    """

    def __init__(self, config: Config, question: PlanQuestion, sampled: SampledKeys, folder: Path) -> None:
        self._question, self._sampled, self._folder = question, sampled, folder
        self._config = config_of_runs(config, sampled, folder)
        self._measured = cache(self._measure)

    def machine(self, local_ranks: int) -> Machine:
        """Measure the machine with `local_ranks` ranks, at their batch size or the largest that is measured."""
        cores = len(os.sched_getaffinity(0))
        check_threads(self._config.run.threads, cores)
        size = min(LARGEST_MEASURED, self._question.sizes(local_ranks)[0], self._sampled.index.num_samples // 4)
        processes, threads = min(local_ranks, cores), self._config.run.threads or max(1, cores // local_ranks)
        small, large = self._measured(max(1, size), processes, threads)
        wire = measure_collectives(max(2, min(local_ranks, _MOST_PROCESSES)))
        network = NetworkSpeed(
            call_s=(wire["alltoall_call_s"] + wire["allreduce_call_s"]) / 2,
            latency_s=self._question.latency_s,
            link_bytes_per_s=self._question.link_bytes_per_s,
            local_bytes_per_s=2 / max(1e-12, wire["alltoall_byte_s"] + wire["allreduce_byte_s"]),
            ranks_per_machine=local_ranks,
        )
        # Decoding has no more threads in a run than here.
        reading = self._sampled.read
        slower = max(1.0, reading.cores / threads)
        read = StageRate(0.0, reading.unit_s * slower, reading.cores / slower)
        route, gather, embed, worker, rows = (line(small, large, name) for name in _PIECES)
        rates = StageRates(read, route, gather, embed, worker, rows, jitter=min(_MOST_JITTER, large.spread))
        alone = dataclasses.replace(network, ranks_per_machine=processes)
        return Machine(rates, network, cores, interference(large, Machine(rates, alone, cores)))

    def _measure(self, size: int, processes: int, threads: int) -> tuple[TimedSteps, TimedSteps]:
        """Time batches of a third of `size`, and of `size`."""
        small, large = (self._train(each, processes, threads) for each in (max(1, size // 3), size))
        return small, large

    def _train(self, size: int, processes: int, threads: int) -> TimedSteps:
        folder = self._folder / f"runs-{size}-{processes}-{threads}"
        config = self._config.model_copy(
            update={
                "data": self._config.data.model_copy(update={"global_batch_size": size}),
                "run": self._config.run.model_copy(update={"dir": str(folder), "threads": threads}),
            }
        )
        folder.mkdir()
        save_config(config, folder / "config.yaml")
        command = [sys.executable, "-m", "trainer.main", "--config", str(folder / "config.yaml")]
        names = [f"rank-{number}" for number in range(processes)]
        run_together([[*command, f"run.name={name}"] for name in names])
        reports = [json.loads((folder / name / "report.json").read_text()) for name in names]
        counts = self._sampled.counts(size, 1)
        units = {"read": counts.decoded, "route": size, "worker": size}
        units |= {"gather": counts.images.unique, "embed": counts.images.unique, "rows": counts.ids.unique}
        return timed(reports, size, units)


def timed(reports: Sequence[Mapping[str, Any]], size: int, units: Mapping[str, float]) -> TimedSteps:
    """Take the figures of a step out of the reports of runs with batches of `size` samples, mean over the runs."""

    def median_s(*stages: str) -> float:
        return fmean(sum(r["stages"][s]["median_ms"] for s in stages if s in r["stages"]) / 1e3 for r in reports)

    own = {stage for report in reports for stage in report["stages"]} - {*AHEAD, WAIT}
    seconds = {piece: median_s(*stages) for piece, stages in _STAGES.items()}
    seconds["worker"] = median_s(*own.difference(*_STAGES.values()))
    step_s = fmean(size / report["samples_per_s"] for report in reports)
    busy_s = step_s * fmean(report["busy_cores"] for report in reports)
    spread = fmean(report["step_spread"] for report in reports)
    cores = max(0.1, busy_s / (sum(seconds.values()) + median_s("read")))
    return TimedSteps(dict(units), seconds, cores, step_s, spread)


def line(small: TimedSteps, large: TimedSteps, name: str) -> StageRate:
    """Draw a piece's line through two sizes; all is per unit where it would not grow, or begin below zero."""
    units, seconds = large.units[name], large.seconds[name]
    if units <= small.units[name]:
        return StageRate(seconds if units == 0 else 0.0, seconds / units if units else 0.0, large.cores)
    slope = (seconds - small.seconds[name]) / (units - small.units[name])
    fixed = seconds - slope * units
    if slope <= 0 or fixed < 0:
        return StageRate(0.0, seconds / units, large.cores)
    return StageRate(fixed, slope, large.cores)


def interference(measured: TimedSteps, machine: Machine) -> float:
    """Divide a measured step by what its stages let expect on a machine that is as full as this one was."""
    stages: dict[str, StageCost] = {}
    for name, units in measured.units.items():
        piece: StageRate = getattr(machine.rates, name)
        stages[name] = StageCost(piece.seconds(units), piece.seconds(units) * piece.cores)
    # The runs wait for nobody: the expected time is that of ranks without a wire, and without jitter among them.
    calm = dataclasses.replace(machine, rates=dataclasses.replace(machine.rates, jitter=0.0))
    return measured.step_s / step_seconds(stages, machine.network.ranks_per_machine, calm)


def measure_collectives(ranks: int) -> dict[str, float]:
    """Run `trainer.plan.collectives` with these ranks on this machine; return its figures."""
    (output,) = run_together([[*launcher_of(ranks), "-m", "trainer.plan.collectives"]])
    found: dict[str, float] = json.loads(output[output.index("{") :].splitlines()[0])
    return found


def is_large(info: StoreInfo, num_rows: int) -> bool:
    """Return whether all features are more than a quarter of this machine's memory, too many to map here."""
    return num_rows * info.row_bytes > _STORE_OF_MEMORY * physical_memory_bytes()


def make_standin(folder: Path, info: StoreInfo, keys_U: Int64) -> FeatureStore:
    """Make a store of drawn features for `keys_U`, or as many of them as a twentieth of the memory holds.

    int8 becomes bfloat16, which needs no codec.
    """
    dtype = "bfloat16" if info.dtype == "int8" else info.dtype
    small = StoreInfo(num_shards=_SHARDS, dim=info.dim, dtype=dtype, extractor=info.extractor)
    store = FeatureStore.create(folder, small)
    draw = np.random.default_rng(0)
    keys_U = keys_U[: max(1, int(_STANDIN_OF_MEMORY * physical_memory_bytes() / small.row_bytes))]
    for start in range(0, len(keys_U), _ROWS_A_PUT):
        part_U = keys_U[start : start + _ROWS_A_PUT]
        values_UD = np.maximum(draw.standard_normal((len(part_U), info.dim), dtype=np.float32), 0)
        uris = [f"drawn/{key}" for key in part_U]
        store.put(FeatureRows.of(uris, to_bits(values_UD, dtype), keys=part_U))
    return store


def config_of_runs(config: Config, sampled: SampledKeys, folder: Path) -> Config:
    """Make the configuration of a few steps on a part of the samples, which write as little as they can.

    In the place of a large store comes a small one; images that are not in it are zeros, which cost the same. ID tables
    have no more rows than such a run could fill.
    """
    _copy_samples(sampled, folder / "samples" / "train", _STEPS * LARGEST_MEASURED)
    data: dict[str, Any] = {"samples": str(folder / "samples"), "train_days": None, "test_days": []}
    if is_large(sampled.snapshot.info, sampled.snapshot.num_rows):
        make_standin(folder / "features", sampled.snapshot.info, sampled.image_keys_U)
        data |= {"store": str(folder / "features"), "store_version": None, "missing": "zeros"}
        data |= {"cache_dir": str(folder / "cache")}
    tables = {name: _as_small(each) for name, each in config.model.tables.items()}
    never = {"eval_every": None, "early_stopping": None, "checkpoint_every": None}
    train = {"epochs": _STEPS, "max_steps": _STEPS, **never}
    run = {"resume": None, "warm_start": None, "overwrite": False, "profile": False}
    changes = {"data": data, "model": {"tables": tables}, "train": train, "run": run}
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    return config.model_copy(update=sections)


def _as_small(table: TableConfig) -> TableConfig:
    if isinstance(table, int):
        return min(table, _MOST_TABLE_ROWS)
    return table.model_copy(update={"max_rows": min(table.max_rows, _MOST_TABLE_ROWS)})


def _copy_samples(sampled: SampledKeys, folder: Path, num_samples: int) -> None:
    """Copy row groups with at least `num_samples` samples, drawn from all, as files of their own to this disk."""
    folder.mkdir(parents=True)
    columns = list(source_columns(rules_of(sampled.schema)))
    for number in np.random.default_rng(0).permutation(len(sampled.index.row_groups)):
        row_group = sampled.index.row_groups[number]
        file = folder / f"{name_of(row_group.file).removesuffix('.parquet')}-{number}.parquet"
        pq.write_table(read_row_group(sampled.index.storage, row_group, columns), file)
        os.utime(file, (2**32, 2**32))  # from the future: the trainer keeps no digest of a file that may still change
        num_samples -= row_group.num_samples
        if num_samples <= 0:
            break


def run_together(commands: Sequence[Sequence[str]]) -> list[str]:
    """Run programs at the same time; return what they print. Raises PlanError with the error of one that fails."""
    # A stage ends when its kernels do.
    environment = {"CUDA_LAUNCH_BLOCKING": "1", **os.environ}

    def call(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=environment)

    try:
        with ThreadPoolExecutor(len(commands)) as pool:
            done = list(pool.map(call, commands))
    except subprocess.TimeoutExpired as failure:
        raise PlanError(
            f"measuring this machine did not end within {_TIMEOUT_S} s; give fewer samples per rank, or a machine less "
            "busy"
        ) from failure
    for each in done:
        if each.returncode != 0:
            errors = [text.partition("error: ")[2] for text in each.stderr.splitlines() if "error: " in text]
            said = errors[0] if errors else "\n".join((each.stderr or each.stdout).strip().splitlines()[-5:])
            raise PlanError(f"measuring this machine failed ({len(commands)} processes): {said}")
    return [each.stdout for each in done]
