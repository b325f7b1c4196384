"""Calibration: what this machine needs for samples of one's own.

For L ranks on a machine, L runs of one rank each go at the same time: the machine is as full as it will be, and no wire
is in their stages. What a collective costs is measured apart, on ranks of its own.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch

from featurestore import FeatureRows, FeatureStore, StoreInfo, to_bits
from featurestore.lookup.embedding import EmbeddingModel
from featurestore.lookup.partition import physical_memory_bytes
from featurestore.snapshot import Snapshot
from trainer.comm import SoloComm
from trainer.comm.connecting import launcher_of
from trainer.config.config import Config, save_config
from trainer.config.options import TableConfig
from trainer.engine.engine import model_name, table_shapes
from trainer.engine.machine import check_threads
from trainer.errors import ConfigError, PlanError
from trainer.exchange.routing import Int64
from trainer.ids.optimizers import state_of
from trainer.ids.tables import owned_bytes
from trainer.models.layers import used_fields, width_of
from trainer.models.nets import build_model
from trainer.plan.cost import (
    BatchCounts,
    DrawnSamples,
    Machine,
    NetworkSpeed,
    StageRate,
    StageRates,
    Widths,
    step_seconds,
)
from trainer.plan.table import StoredBytes, TrainingPlan, build
from trainer.runs.open import train_reader
from trainer.runs.stores import store_places, with_rough_statistics
from trainer.samples.columns import name_of, rules_of, source_columns
from trainer.samples.reader import SampleIndex, SampleReader, open_index, read_row_group
from trainer.schema import Schema, load_schema
from trainer.stages import AHEAD, WAIT

_DRAWN_BATCHES = 4
_LEAST_DRAWN, _MOST_DRAWN = 100_000, 1_000_000
LARGEST_MEASURED = 3_000
"""Samples of the batches on which this machine is measured, at most."""


@dataclass(frozen=True)
class PlanQuestion:
    """The ranks, batch and network of a plan. `per_rank`: the batch size is each rank's, not of all together."""

    ranks: tuple[int, ...]
    batch_size: int
    per_rank: bool
    ranks_per_machine: int
    link_bytes_per_s: float
    latency_s: float

    def global_size(self, ranks: int) -> int:
        """Return the samples of one step of `ranks` ranks."""
        return self.batch_size * ranks if self.per_rank else self.batch_size

    def sizes(self, ranks: int) -> tuple[int, int]:
        """Return the samples of one rank, and of all of them."""
        size = self.global_size(ranks)
        return max(1, size // ranks), size

    def check(self) -> None:
        """Raise ConfigError where ranks would be without samples."""
        for count in self.ranks:
            if self.global_size(count) < count:
                raise ConfigError(
                    f"a global batch of {self.batch_size} samples leaves some of {count} ranks without any; "
                    f"give --global-batch-size of at least {count}, or --samples-per-rank"
                )


def numbers(text: str) -> tuple[int, ...]:
    """Parse numbers of ranks, ascending. Raises ConfigError."""
    found = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(found) < 1:
        raise ConfigError(f"--ranks {text}: write numbers from 1 on with commas between them, as 8,20,40")
    return tuple(sorted(set(found)))


@dataclass(frozen=True)
class SampledKeys:
    """The samples and the store of a configuration, and what batches drawn from them say."""

    schema: Schema
    index: SampleIndex
    snapshot: Snapshot
    images: DrawnSamples
    ids: DrawnSamples
    id_vector_floats: float
    image_keys_U: Int64
    """Keys of the first batches, for a store in the place of one too large."""
    read: StageRate
    """Per sample decoded, from Parquet to a batch."""
    config: Config

    def counts(self, size: int, ranks: int) -> BatchCounts:
        """Count the keys of a global batch of `size` samples on `ranks`, and what the rank decodes that has most to."""
        reader = train_reader(self.config.changed(data={"global_batch_size": size}), self.index, self.schema)
        decoded = size / ranks * max(reader.decode_shares(ranks))
        return BatchCounts(size, ranks, decoded, self.images.keys(size, ranks), self.ids.keys(size, ranks))


def sample(config: Config, question: PlanQuestion) -> SampledKeys:
    """Draw batches as the trainer would. Raises what opening samples and store raises, ConfigError without images."""
    data = config.data
    schema = load_schema(data.schema_file)
    places = store_places(config, schema)
    if not places:
        raise ConfigError("model.images=none: a plan is about training with images; set it to ad, behavior or both")
    if len(places) > 1:
        raise ConfigError(
            f"a plan is made for one feature store, and the schema's content fields name {len(places)} "
            f"({', '.join(place.name for place in places)}); give it a schema with the largest one alone"
        )
    fields = used_fields(schema, config.model)
    index = open_index(SoloComm(), data.samples, "train", schema, data.train_days)
    sizes = sorted({size for count in (1, *question.ranks) for size in question.sizes(count)})
    if sizes[-1] > index.num_samples:
        raise ConfigError(
            f"a global batch of {sizes[-1]:,} samples is larger than all {index.num_samples:,} training samples, "
            f"in which its keys are counted; give --global-batch-size of at most {index.num_samples}, or more samples"
        )
    schema = with_rough_statistics(SoloComm(), index, schema)
    snapshot = FeatureStore.open(data.store).snapshot(data.store_version)
    total = min(index.num_samples, max(_LEAST_DRAWN, min(_MOST_DRAWN, _DRAWN_BATCHES * sizes[-1]), sizes[-1]))
    seed, window = (config.train.seed, data.shuffle_window_groups) if data.shuffle else (None, 1)
    reader = SampleReader(index, schema, batch_size=total, seed=seed, window_groups=window)
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    batch = next(reader.batches())
    read_s, read_cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    of_user = frozenset(field.name for field in schema.fields if field.side == "user")

    def drawn(source_of: dict[str, str], shards: int) -> DrawnSamples:
        names = [[f for f, s in source_of.items() if s == source] for source in dict.fromkeys(source_of.values())]
        return DrawnSamples(batch, tuple(tuple(each) for each in names), of_user, shards)

    content = {f.name: model_name(f, config.model) for f in fields if f.kind == "content"}
    images = drawn(content, snapshot.info.num_shards)
    shapes = {shape.name: shape for shape in table_shapes(fields, config.model)}
    id_fields = {f.name: f.table_name for f in fields if f.is_id}
    ids = drawn(id_fields, config.model.table_shards)
    unique_T = [len(np.unique(keys_N)) for keys_N in ids.keys_of(range(min(total, sizes[-1])))]
    widths_T = [shapes[name].width for name in dict.fromkeys(id_fields.values())]
    first = images.keys_of(range(min(total, 16 * LARGEST_MEASURED)))
    return SampledKeys(
        schema=schema,
        index=index,
        snapshot=snapshot,
        images=images,
        ids=ids,
        id_vector_floats=float(np.average(widths_T, weights=unique_T)) if sum(unique_T) else 0.0,
        image_keys_U=np.unique(np.concatenate(first)),
        read=StageRate(0.0, read_s / reader.num_decoded, read_cpu_s / read_s),
        config=config,
    )


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
    stages = {name: getattr(machine.rates, name).cost(units) for name, units in measured.units.items()}
    # The runs wait for nobody: the expected time is that of ranks without a wire, and without jitter among them.
    calm = dataclasses.replace(machine, rates=dataclasses.replace(machine.rates, jitter=0.0))
    return measured.step_s / step_seconds(stages, machine.network.ranks_per_machine, calm)


def measure_collectives(ranks: int) -> dict[str, float]:
    """Run `trainer.plan.cost` with these ranks on this machine; return its figures."""
    (output,) = run_together([[*launcher_of(ranks), "-m", "trainer.plan.cost"]])
    found: dict[str, float] = json.loads(output[output.index("{") :].splitlines()[0])
    return found


def is_large(info: StoreInfo, num_rows: int) -> bool:
    """Return whether all features are more than a quarter of this machine's memory, too many to map here."""
    return num_rows * info.row_bytes > _STORE_OF_MEMORY * physical_memory_bytes()


def make_standin(folder: Path, info: StoreInfo, keys_U: Int64) -> FeatureStore:
    """Make a store of drawn features for `keys_U`, or as many of them as a twentieth of the memory holds."""
    small = StoreInfo(num_shards=_SHARDS, dim=info.dim, dtype=info.dtype, extractor=info.extractor)
    store = FeatureStore.create(folder, small)
    draw = np.random.default_rng(0)
    keys_U = keys_U[: max(1, int(_STANDIN_OF_MEMORY * physical_memory_bytes() / small.row_bytes))]
    for start in range(0, len(keys_U), _ROWS_A_PUT):
        part_U = keys_U[start : start + _ROWS_A_PUT]
        values_UD = np.maximum(draw.standard_normal((len(part_U), info.dim), dtype=np.float32), 0)
        uris = [f"drawn/{key}" for key in part_U]
        store.put(FeatureRows.of(uris, to_bits(values_UD, info.dtype), keys=part_U))
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


_FLOAT_BYTES = 4
_MOST_LOAD = 0.5

Say = Callable[[str], None]


def plan_own(config: Config, question: PlanQuestion, say: Say) -> TrainingPlan:
    """Draw batches, measure this machine, and make the plan. Raises TrainerError, FeatureStoreError."""
    question.check()
    busy = busy_machine(os.getloadavg()[0], len(os.sched_getaffinity(0)))
    say("reading samples")
    sampled = sample(config, question)
    machines: dict[int, Machine] = {}
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        calibration = Calibration(config, question, sampled, Path(folder))
        for local in sorted({min(count, question.ranks_per_machine) for count in (1, *question.ranks)}):
            say(f"measuring this machine with {local} rank{'s' if local > 1 else ''} on it")
            machines[local] = calibration.machine(local)
    return build(
        title=f"{config.data.samples} and {config.data.store}, snapshot {sampled.snapshot.version}",
        counts_of=lambda ranks: sampled.counts(question.global_size(ranks), ranks),
        ranks=question.ranks,
        base_ranks=1,
        widths=widths(config, sampled),
        machines=machines,
        stored=stored_bytes(config, sampled),
        samples=sampled.index.num_samples,
        assumptions=assumptions(question, sampled, machines),
        warnings=busy,
    )


def widths(config: Config, sampled: SampledKeys) -> Widths:
    """Return the bytes of what travels, from the schema, the model's settings and the store."""
    model, dim = config.model, sampled.snapshot.info.dim
    on_wire = 2 if config.exchange.wire_dtype == "bfloat16" else _FLOAT_BYTES
    content = {model_name(f, model): f for f in used_fields(sampled.schema, model) if f.kind == "content"}
    widths_of_model = [width_of(field, model) for field in content.values()]
    with torch.device("meta"):
        networks = [
            build_model(sampled.schema, model),
            *(EmbeddingModel(dim, model.embed_hidden, width) for width in widths_of_model),
        ]
    dense = sum(parameter.numel() for network in networks for parameter in network.parameters())
    return Widths(max(widths_of_model) * on_wire, sampled.id_vector_floats * on_wire, dense * _FLOAT_BYTES)


def stored_bytes(config: Config, sampled: SampledKeys) -> StoredBytes:
    """Tell what is held: the store's rows, all ID tables with their optimiser's state, and in how much memory."""
    snapshot, shapes = sampled.snapshot, table_shapes(used_fields(sampled.schema, config.model), config.model)
    state = state_of(config.optim)
    return StoredBytes(
        feature_bytes=snapshot.num_rows * snapshot.info.row_bytes,
        shards=snapshot.info.num_shards,
        table_bytes=sum(owned_bytes(shape, 0, 1, state, torch.float32) for shape in shapes),
        table_shards=config.model.table_shards,
        machine_memory_bytes=physical_memory_bytes(),
        copied=config.train.checkpoint_beside,
    )


def busy_machine(load: float, cores: int) -> list[str]:
    """Return a line of advice where other programs keep many cores busy (`load`): a measurement says little then."""
    if load <= _MOST_LOAD * cores:
        return []
    return [f"This machine was busy before it was measured ({load:.2g} of {cores} cores, the last minute): repeat."]


def assumptions(question: PlanQuestion, sampled: SampledKeys, machines: Mapping[int, Machine]) -> list[str]:
    """List the assumptions, a line each; `machines` by ranks on one machine."""
    per_machine, speed = question.ranks_per_machine, question.link_bytes_per_s * 8 / 1e9
    lines = [
        f"Every machine is like this one, with {per_machine} rank{'s' if per_machine > 1 else ''} on it; "
        f"they are joined by a network of {speed:g} Gbit/s each way with {question.latency_s * 1e6:g} us for a message "
        "(--network-gbit, --latency-us); nobody else uses it.",
        f"Keys are counted in batches drawn from the samples: measured up to {sampled.images.num_samples:,} samples.",
        "Features lie in memory (or in the cache of files). ID rows count twice where checkpoints are written during "
        "the training, from a copy (train.checkpoint_beside).",
        "Evaluation, checkpoints and the start of a run are left out.",
    ]
    lines += [
        f"Measured with {local} on a machine: a step of the real loop takes {machine.interference:.2f} times what its "
        f"stages say; steps vary by {machine.rates.jitter:.1%}; a collective costs {machine.network.call_s * 1e3:.2g} "
        f"ms, a rank moves {machine.network.local_bytes_per_s / 1e9:.2g} GB/s."
        for local, machine in machines.items()
    ]
    if is_large(sampled.snapshot.info, sampled.snapshot.num_rows):
        lines.append(
            "The store is larger than a quarter of this machine's memory: drawn features stood in for it while E "
            "and the gather were measured."
        )
    return lines
