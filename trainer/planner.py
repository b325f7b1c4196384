"""The planner: what a step costs on ranks and machines, what this machine needs for samples of one's own, and the plan.

Costs are bytes that travel, and seconds, each a mean over steps. The plan has a row for each number of ranks, and the
number to take.

The real loop is timed, by runs of one rank each: as many at a time as ranks will share a machine, so that it is as full
as it will be, and no wire is in their steps. What a collective costs is measured apart, on ranks of its own, by this
module as a program: horovodrun -np 2 python -m trainer.planner
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from featurestore import FeatureRows, FeatureStore, StoreInfo, to_bits
from featurestore.console.output import print_line, print_table
from featurestore.keys import Int64Array, owner_of, shard_of
from featurestore.lookup.embedding import EmbeddingModel
from featurestore.lookup.rowfiles import physical_memory_bytes
from featurestore.snapshot import Snapshot
from trainer.comm import Comm, SoloComm, connect
from trainer.comm.comm import launcher_of
from trainer.config import Config, TableConfig, save_config
from trainer.engine.machine import check_threads
from trainer.engine.wiring import table_shapes, widths_of_stores
from trainer.errors import ConfigError, PlanError
from trainer.ids.optimizers import state_of
from trainer.ids.shards import owned_bytes
from trainer.models import layers, nets
from trainer.runs.open import store_places, train_reader
from trainer.samples.columns import name_of, rules_of, source_columns
from trainer.samples.index import SampleIndex, open_index, read_row_group
from trainer.samples.reader import Batch
from trainer.samples.survey import fill_in, measure
from trainer.schema import Schema, load_schema
from trainer.stages import WAIT

KEY_BYTES = 8
_ROUNDS, _WARM_UP = 15, 3
_SMALL_FLOATS, _LARGE_FLOATS = 64, 2 << 20


@dataclass(frozen=True)
class KeyCounts:
    """Counts of keys of one kind (images, ids) in one global batch of P ranks."""

    asked: float
    """Unique keys of one rank, mean over ranks: those it requests, and those requested from an owner."""
    unique: float
    """In the whole batch."""
    owned: float
    """Unique keys of the busiest owner."""

    def skew(self, ranks: int) -> float:
        """Divide the keys of the busiest owner by the mean."""
        return self.owned * ranks / self.unique if self.unique else 1.0


@dataclass(frozen=True)
class BatchCounts:
    """What one step of a global batch of `samples` on `ranks` works on.

    `decoded`: samples that the rank decodes which has most to.
    """

    samples: int
    ranks: int
    decoded: float
    images: KeyCounts
    ids: KeyCounts


@dataclass(frozen=True)
class Widths:
    """The bytes of a vector and of the dense gradients, as they travel."""

    image_vector_bytes: int
    id_vector_bytes: float
    dense_bytes: int
    """Gradients of all parameters that every rank holds."""


@dataclass(frozen=True)
class NetworkSpeed:
    """Collectives by Hockney's model: a call, a latency per message, a time per byte.

    An alltoall is P - 1 messages of each rank; a ring allreduce 2 (P - 1), and 2 (P - 1) / P of its values leave a rank
    (Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", 2005).
    Ranks of one machine share its link; what they send each other goes at the speed of the loopback.
    """

    call_s: float
    """Seconds of any collective without data, measured between ranks of one machine."""
    latency_s: float
    """Additional seconds per message to another rank if there are several machines."""
    link_bytes_per_s: float
    """Of a machine, each way."""
    local_bytes_per_s: float
    """Bandwidth of a rank, between ranks of one machine: also the limit of its software."""
    ranks_per_machine: int = 1

    def alltoall_s(self, ranks: int, bytes_out: float) -> float:
        """Return the seconds of an alltoall. `bytes_out`: bytes sent or received by a rank, whichever is more."""
        return self._seconds(ranks, ranks - 1, bytes_out)

    def allreduce_s(self, ranks: int, size_bytes: float) -> float:
        """Return the seconds of a ring allreduce. `size_bytes`: of the values that are summed."""
        return self._seconds(ranks, 2 * (ranks - 1), ring_bytes(ranks, size_bytes))

    def _seconds(self, ranks: int, messages: int, bytes_out: float) -> float:
        if ranks == 1:
            return 0.0
        local = min(self.ranks_per_machine, ranks)
        if local == ranks:
            return self.call_s + bytes_out / self.local_bytes_per_s
        away = bytes_out * (ranks - local) / (ranks - 1)
        speed = min(self.link_bytes_per_s / local, self.local_bytes_per_s)
        return self.call_s + messages * self.latency_s + away / speed + (bytes_out - away) / self.local_bytes_per_s


@dataclass(frozen=True)
class Machine:
    """A rank's times on a machine with its final number of ranks, and the network between ranks."""

    read_s: float
    """Per sample decoded, from Parquet to a batch; reading goes on during the step."""
    image_s: float
    """Of a step without a wire, per unique image: gather and E, forward and backward."""
    sample_s: float
    """All else of this step, per sample of the rank."""
    network: NetworkSpeed


@dataclass(frozen=True)
class StepCost:
    """The bytes and seconds of one step. Bytes leave a rank, mean over ranks."""

    seconds: float
    samples_per_s: float
    bytes_by_part: Mapping[str, float]
    stages: Mapping[str, float]
    """Seconds of each part of a step."""

    @property
    def bytes_sent(self) -> float:
        """Return the bytes that one rank sends to others in a step."""
        return sum(self.bytes_by_part.values())


def ring_bytes(ranks: int, size_bytes: float) -> float:
    """Return the bytes that leave a rank in a ring allreduce."""
    return 2 * size_bytes * (ranks - 1) / ranks


def bytes_by_part(counts: BatchCounts, widths: Widths) -> dict[str, float]:
    """Return the bytes that leave a rank in a step, mean over ranks: of its keys, (P - 1) / P belong to others."""
    away = (counts.ranks - 1) / counts.ranks
    images, ids = (width * away for width in (widths.image_vector_bytes, widths.id_vector_bytes))
    return {
        "keys": KEY_BYTES * away * (counts.images.asked + counts.ids.asked),
        "image vectors": images * counts.images.asked,
        "image gradients": images * counts.images.asked,
        "id vectors": ids * counts.ids.asked,
        "id gradients": ids * counts.ids.asked,
        "dense gradients": ring_bytes(counts.ranks, widths.dense_bytes),
    }


def step_cost(counts: BatchCounts, widths: Widths, machine: Machine) -> StepCost:
    """Compute the step of a global batch, which waits for the busiest owner.

    Keys are exchanged during the step before, and reading goes on during all steps: it counts where it takes longer.
    """
    sizes, ranks, network = bytes_by_part(counts, widths), counts.ranks, machine.network
    vectors = counts.images.skew(ranks) * sizes["image vectors"] + counts.ids.skew(ranks) * sizes["id vectors"]
    vectors_s = network.alltoall_s(ranks, vectors)
    stages = {
        "images": machine.image_s * counts.images.owned,
        "samples": machine.sample_s * counts.samples / ranks,
        "vectors": vectors_s,
        "gradients": vectors_s,
        "dense gradients": network.allreduce_s(ranks, widths.dense_bytes),
    }
    read_s = machine.read_s * counts.decoded
    seconds = max(read_s, sum(stages.values()))
    return StepCost(seconds, counts.samples / seconds, sizes, {"read": read_s, **stages})


def measure_collectives(comm: Comm) -> dict[str, float]:
    """Measure seconds of a call and of a sent byte, means of alltoall and allreduce; every rank calls it.

    The slowest rank counts, the median of the rounds. Bytes are those that leave a rank: of an allreduce in a ring,
    2 (P - 1) / P times its values.
    """
    calls_s, bytes_s = [], []
    for collective, ways in ((_alltoall, 1), (_allreduce, 2)):
        call_s, large_s = (_median_s(comm, partial(collective, comm, each)) for each in (_SMALL_FLOATS, _LARGE_FLOATS))
        sent_bytes = 4 * _LARGE_FLOATS * ways * (comm.size - 1) / comm.size
        calls_s.append(call_s)
        bytes_s.append(max(0.0, large_s - call_s) / sent_bytes)
    return {"call_s": statistics.fmean(calls_s), "byte_s": statistics.fmean(bytes_s)}


def _alltoall(comm: Comm, floats: int) -> None:
    rows_N = torch.zeros(max(1, floats // comm.size) * comm.size, 1)
    splits_P = torch.full((comm.size,), len(rows_N) // comm.size, dtype=torch.int32)
    comm.alltoall(rows_N, splits_P, name="plan")


def _allreduce(comm: Comm, floats: int) -> None:
    comm.allreduce_sum_(torch.zeros(floats), name=f"plan.{floats}")


def _median_s(comm: Comm, collective: Callable[[], None]) -> float:
    seconds: list[float] = []
    for number in range(_WARM_UP + _ROUNDS):
        comm.agree(None)
        start = time.perf_counter()
        collective()
        if number >= _WARM_UP:
            seconds.append(time.perf_counter() - start)
    return max(comm.allgather_object(statistics.median(seconds), name="plan.seconds"))


MOST_OF_MEMORY = 0.8
"""Share of a machine's memory for its ranks."""
LEAST_EFFICIENCY = 0.5
"""Least efficiency, per rank, of a recommended number of ranks."""
PROGRAM_BYTES = 2 * 2**30
"""Memory of a rank besides features and ID rows: Python and torch (.6 GB), batches that are read ahead, activations."""


@dataclass(frozen=True)
class StoredBytes:
    """The memory of ranks: the feature store and the ID tables. `table_bytes`: all tables, with Adam's state."""

    feature_bytes: int
    """Of all rows of the store."""
    shards: int
    table_bytes: int
    table_shards: int
    machine_memory_bytes: int
    copied: bool = False
    """Whether checkpoints are written during the training, from a copy of the ID rows."""

    def rank_bytes(self, ranks: int) -> float:
        """Return the bytes of features and ID rows, and of the copy of these, on the rank that has most."""
        features = self.feature_bytes * most_shards(self.shards, ranks) / self.shards
        tables = self.table_bytes * most_shards(self.table_shards, ranks) / self.table_shards
        return features + tables * (2 if self.copied else 1)


@dataclass(frozen=True)
class RankPlan:
    """The plan for one number of ranks. `efficiency`: samples/s of a rank over those of one rank alone."""

    ranks: int
    counts: BatchCounts
    machine: Machine
    cost: StepCost
    efficiency: float
    epoch_s: float
    rank_bytes: float
    machine_bytes: float
    """Memory that a machine needs for its ranks: features, ID rows and programs; a fifth stays free."""


@dataclass(frozen=True)
class TrainingPlan:
    """The rows of all numbers of ranks, and the number to take (None: no row fits into memory)."""

    title: str
    samples: int
    """Of an epoch."""
    rows: tuple[RankPlan, ...]
    recommended_ranks: int | None
    advice: tuple[str, ...]
    """The recommendation and its reason, then numbers of ranks that are slower than one."""


def build(
    title: str,
    counts_of: Callable[[int], BatchCounts],
    ranks: Sequence[int],
    widths: Widths,
    machine_of: Callable[[int], Machine],
    stored: StoredBytes,
    samples: int,
) -> TrainingPlan:
    """Make the plan for each of `ranks`; `machine_of` gives a machine of a job with so many ranks."""
    base = step_cost(counts_of(1), widths, machine_of(1))
    rows, advice = [], []
    for count in ranks:
        machine, counts = machine_of(count), counts_of(count)
        cost, rank_bytes = step_cost(counts, widths, machine), stored.rank_bytes(count)
        local = min(count, machine.network.ranks_per_machine)
        rows.append(
            RankPlan(
                ranks=count,
                counts=counts,
                machine=machine,
                cost=cost,
                efficiency=cost.samples_per_s / (base.samples_per_s * count),
                epoch_s=samples / cost.samples_per_s,
                rank_bytes=rank_bytes,
                machine_bytes=local * (rank_bytes + PROGRAM_BYTES) / MOST_OF_MEMORY,
            )
        )
        if count > 1 and cost.samples_per_s < base.samples_per_s:
            times = cost.samples_per_s / base.samples_per_s
            advice.append(f"{count} ranks are slower than 1: they make {times:.2g} times its samples/s.")
    recommended, reason = recommend(rows, stored.machine_memory_bytes)
    return TrainingPlan(title, samples, tuple(rows), recommended, (reason, *advice))


def recommend(rows: Sequence[RankPlan], memory_bytes: int) -> tuple[int | None, str]:
    """Recommend the most ranks whose efficiency is half or more, of those whose memory a machine has, and say why.

    Where all are less efficient it is the fewest ranks that fit; None where none does.
    """
    fitting = [row for row in rows if row.machine_bytes <= memory_bytes]
    if not fitting:
        least = min(rows, key=lambda row: row.machine_bytes)
        return None, (
            f"None of {', '.join(str(row.ranks) for row in rows)} ranks fits: with {least.ranks} a machine needs "
            f"{least.machine_bytes / 1e9:,.3g} GB and this one has {memory_bytes / 1e9:,.3g} GB. Plan with more "
            "--ranks, or with a smaller store (crossmedia store remake)."
        )
    efficient = [row for row in fitting if row.efficiency >= LEAST_EFFICIENCY]
    row = max(efficient, key=lambda row: row.ranks) if efficient else min(fitting, key=lambda row: row.ranks)
    why = "the most that are" if efficient else "the fewest, as none is"
    return row.ranks, (
        f"Take {_ranks(row.ranks)}: {why} at least {LEAST_EFFICIENCY:.0%} efficient ({row.efficiency:.0%}). "
        f"A machine needs {row.machine_bytes / 1e9:,.3g} GB of memory."
    )


def most_shards(num_shards: int, ranks: int) -> int:
    """Count the shards of the rank that has most."""
    return -(-num_shards // ranks)


def as_json(plan: TrainingPlan) -> dict[str, Any]:
    """Return everything in the plan as plain values; `ranks` maps each number of ranks to its row."""
    values = asdict(plan)
    rows = {str(row.pop("ranks")): row for row in values.pop("rows")}
    return values | {"ranks": rows}


def show(plan: TrainingPlan, console: Console) -> None:
    """Print the rows, then the recommendation."""
    print_line(console, plan.title, style="bold")
    epoch = f"epoch of {plan.samples:,}"
    table = Table()
    for column in ("ranks", "images", "memory of a rank", "sent in a step", "step", "samples/s", epoch, "efficiency"):
        table.add_column(column, justify="right")
    for row in plan.rows:
        counts = (str(row.ranks), f"{row.counts.images.unique:,.0f}", size(row.rank_bytes), size(row.cost.bytes_sent))
        times = (duration(row.cost.seconds), f"{row.cost.samples_per_s:,.0f}", duration(row.epoch_s))
        style = "bold" if row.ranks == plan.recommended_ranks else None
        table.add_row(*counts, *times, f"{row.efficiency:.0%}", style=style)
    print_table(console, table)
    print_line(console, "Recommended", style="bold")
    for line in plan.advice:
        print_line(console, f"- {line}")


def size(count: float) -> str:
    """Format bytes with a unit, as 1.23 MB."""
    return decimal(round(count), precision=2)


def duration(seconds: float) -> str:
    """Format seconds, as 1.23 ms, 12.3 s, 4.56 h."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 600:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.3g} h"


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"


_DRAWN_BATCHES, _MOST_COUNTED = 4, 8

_LEAST_DRAWN, _MOST_DRAWN = 100_000, 1_000_000

_MEASURED_ROW_GROUPS = 32  # for the statistics of numbers: their costs are asked for, and not their figures


@dataclass(frozen=True)
class DrawnSamples:
    """Many samples in the order in which an epoch has them, as one batch, and the fields of each source.

    Fields of one source (one E over a store, one ID table) share its keys: a key in two of them is asked for once.
    """

    batch: Batch
    sources: tuple[tuple[str, ...], ...]
    user_fields: frozenset[str]
    num_shards: int

    @property
    def num_samples(self) -> int:
        """Count the samples."""
        return self.batch.num_samples

    def keys_of(self, span: range) -> list[Int64Array]:
        """Return the keys of each source in samples `span`, with repetitions; a cut group has its user fields."""
        return [np.concatenate([self._values(name, span) for name in names]) for names in self.sources]

    def keys(self, samples: int, ranks: int) -> KeyCounts:
        """Count the keys of global batches that are cut into the slices of `ranks` ranks, mean over the batches."""
        count = min(_MOST_COUNTED, self.num_samples // samples)  # spread evenly, none overlaps another
        starts = [(self.num_samples - samples) * number // max(1, count - 1) for number in range(count)]
        found = np.array([self._of_batch(range(start, start + samples), ranks) for start in starts]).mean(axis=0)
        return KeyCounts(*(float(each) for each in found))

    def _of_batch(self, span: range, ranks: int) -> tuple[float, float, float]:
        """Count the keys that a rank asks for, unique keys, and those of the busiest owner."""
        asked, owned_P = 0, np.zeros(ranks, np.int64)
        for rank in range(ranks):
            part = range(span.start + len(span) * rank // ranks, span.start + len(span) * (rank + 1) // ranks)
            asked += sum(len(np.unique(keys_N)) for keys_N in self.keys_of(part)) if part else 0
        for keys_N in self.keys_of(span):
            owners_U = owner_of(shard_of(np.unique(keys_N), self.num_shards), ranks)
            owned_P += np.bincount(owners_U, minlength=ranks)
        return asked / ranks, float(owned_P.sum()), float(owned_P.max())

    def _values(self, name: str, span: range) -> Int64Array:
        jagged, group_B = self.batch.fields[name], self.batch.group_of_sample_B
        of_user = name in self.user_fields
        rows = range(int(group_B[span.start]), int(group_B[span.stop - 1]) + 1) if of_user else span
        ends_M = np.cumsum(jagged.lengths_M, dtype=np.int64)
        first = int(ends_M[rows.start]) - int(jagged.lengths_M[rows.start])
        return jagged.values_N[first : int(ends_M[rows.stop - 1])]


@dataclass(frozen=True)
class SampledKeys:
    """The samples and the store of a configuration, and what batches drawn from them say."""

    config: Config
    schema: Schema
    index: SampleIndex
    snapshot: Snapshot
    images: DrawnSamples
    ids: DrawnSamples
    read_s: float
    """Per sample decoded, from Parquet to a batch."""

    def counts(self, size: int, ranks: int) -> BatchCounts:
        """Count the keys of a global batch of `size` samples on `ranks`, and what the rank decodes that has most to."""
        reader = train_reader(self.config.changed(data={"global_batch_size": size}), self.index, self.schema)
        decoded = size / ranks * max(reader.decode_shares(ranks))
        return BatchCounts(size, ranks, decoded, self.images.keys(size, ranks), self.ids.keys(size, ranks))


def sample(config: Config, largest: int) -> SampledKeys:
    """Draw batches of up to `largest` samples as the trainer would.

    Raises what opening samples and store raises, and ConfigError without images or with too few samples.
    """
    data, schema = config.data, load_schema(config.data.schema_file)
    places = store_places(config, schema)
    if not places:
        raise ConfigError("model.images=none: a plan is about training with images; set it to ad, behavior or both")
    if len(places) > 1:
        raise ConfigError(
            f"a plan is made for one feature store, and the schema's content fields name {len(places)} "
            f"({', '.join(place.name for place in places)}); give it a schema with the largest one alone"
        )
    index = open_index(SoloComm(), data.samples, "train", schema, data.train_days)
    if largest > index.num_samples:
        raise ConfigError(
            f"a global batch of {largest:,} samples is larger than all {index.num_samples:,} training samples, "
            f"in which its keys are counted; give --global-batch-size of at most {index.num_samples}, or more samples"
        )
    few = replace(index, row_groups=index.row_groups[:_MEASURED_ROW_GROUPS])
    schema = fill_in(schema, measure(SoloComm(), few, schema))
    snapshot = FeatureStore.open(data.store).snapshot(data.store_version)
    total = min(index.num_samples, max(_LEAST_DRAWN, min(_MOST_DRAWN, _DRAWN_BATCHES * largest), largest))
    reader = train_reader(config.changed(data={"global_batch_size": total, "shuffle_streams": 1}), index, schema)
    start_s = time.perf_counter()
    batch = next(reader.batches())
    read_s = (time.perf_counter() - start_s) / reader.num_decoded
    of_user = frozenset(field.name for field in schema.fields if field.side == "user")

    def drawn(source_of: dict[str, str], shards: int) -> DrawnSamples:
        names = [[f for f, s in source_of.items() if s == source] for source in dict.fromkeys(source_of.values())]
        return DrawnSamples(batch, tuple(tuple(each) for each in names), of_user, shards)

    fields = layers.used_fields(schema, config.model)
    content = {f.name: f.store_name for f in fields if f.kind == "content"}
    images = drawn(content, snapshot.info.num_shards)
    ids = drawn({f.name: f.table_name for f in fields if f.is_id}, config.model.table_shards)
    return SampledKeys(config, schema, index, snapshot, images, ids, read_s)


LARGEST_MEASURED = 3_000
"""Samples of the batches on which this machine is measured, at most."""
_STEPS, _TIMEOUT_S = 15, 300
_MOST_RANKS = 8
_MOST_TABLE_ROWS = 1 << 20
_DRAWN_OF_MEMORY, _SHARDS, _ROWS_A_PUT = 0.05, 8, 8_192
_OF_IMAGES = ("gather", "embed images", "embed backward")
_NO_WORK = ("read", "wait for samples", WAIT)  # reading is timed by itself, and goes on meanwhile
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class PlanQuestion:
    """The ranks, global batch and network of a plan."""

    ranks: tuple[int, ...]
    batch_size: int
    ranks_per_machine: int
    link_bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        """Raise ConfigError if a rank would have no samples."""
        if self.batch_size < (most := max(self.ranks)):
            raise ConfigError(
                f"a global batch of {self.batch_size} samples leaves some of {most} ranks without any; "
                f"give --global-batch-size of at least {most}"
            )


def plan_own(config: Config, question: PlanQuestion, say: Callable[[str], None]) -> TrainingPlan:
    """Draw batches, measure this machine, and make the plan. Raises TrainerError, FeatureStoreError."""
    say("reading samples")
    sampled = sample(config, question.batch_size)
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        calibration = Calibration(question, sampled, Path(folder), say)
        return build(
            title=f"{config.data.samples} and {config.data.store}, snapshot {sampled.snapshot.version}; "
            f"machines like this one, joined by {question.link_bytes_per_s * 8 / 1e9:g} Gbit/s",
            counts_of=lambda ranks: sampled.counts(question.batch_size, ranks),
            ranks=question.ranks,
            widths=widths(config, sampled),
            machine_of=calibration.machine,
            stored=stored_bytes(config, sampled),
            samples=sampled.index.num_samples,
        )


class Calibration:
    """This machine at the batch size of a rank, with one rank on it or several.

    Ranks beyond the number of cores take turns on them. A measurement takes about half a minute; `folder` gets the
    samples, a feature store, and the runs. Raises PlanError with the error of a failed run.
    """

    def __init__(self, question: PlanQuestion, sampled: SampledKeys, folder: Path, say: Callable[[str], None]) -> None:
        self._question, self._sampled, self._folder, self._say = question, sampled, folder, say
        self._cores = len(os.sched_getaffinity(0))
        check_threads(sampled.config.run.threads, self._cores)
        self._config = config_of_runs(sampled, folder)
        self._rates, self._network = cache(self._measure), cache(self._measure_network)

    def machine(self, ranks: int) -> Machine:
        """Return a machine of `ranks` ranks, at their batch size or the largest that is measured."""
        local = min(ranks, self._question.ranks_per_machine)
        size = min(self._question.batch_size // ranks, LARGEST_MEASURED, self._sampled.index.num_samples // 4)
        image_s, sample_s = self._rates(max(1, size), local)
        return Machine(self._sampled.read_s, image_s, sample_s, self._network(local))

    def _measure(self, size: int, local: int) -> tuple[float, float]:
        """Run batches of `size` samples; return seconds per unique image and per sample."""
        self._say(f"measuring this machine with {local} rank{'s' * (local > 1)} of {size:,} samples on it")
        processes, threads = min(local, self._cores), self._config.run.threads or max(1, self._cores // local)
        folder = self._folder / f"runs-{size}-{local}"
        folder.mkdir()
        run = {"dir": str(folder), "threads": threads}
        save_config(self._config.changed(data={"global_batch_size": size}, run=run), folder / "config.yaml")
        command = [sys.executable, "-m", "trainer.main", "--config", str(folder / "config.yaml")]
        names = [f"rank-{number}" for number in range(processes)]
        run_together([[*command, f"run.name={name}"] for name in names])
        reports = [json.loads((folder / name / "report.json").read_text()) for name in names]
        image_s, sample_s = rates_of(reports, size, self._sampled.counts(size, 1).images.unique)
        return image_s * local / processes, sample_s * local / processes

    def _measure_network(self, local: int) -> NetworkSpeed:
        ranks = max(2, min(local, _MOST_RANKS))
        (output,) = run_together([[*launcher_of(ranks), "-m", "trainer.planner"]])
        found: dict[str, float] = json.loads(output[output.index("{") :].splitlines()[0])
        return NetworkSpeed(
            call_s=found["call_s"],
            latency_s=self._question.latency_s,
            link_bytes_per_s=self._question.link_bytes_per_s,
            local_bytes_per_s=1 / max(1e-12, found["byte_s"]),
            ranks_per_machine=local,
        )


def rates_of(reports: Sequence[Mapping[str, Any]], size: int, unique_images: float) -> tuple[float, float]:
    """Share the steps of these runs out among their images and samples, as the stages say: seconds of each."""

    def share(stages: Mapping[str, Mapping[str, float]]) -> float:
        work = {name: each["median_ms"] for name, each in stages.items() if name not in _NO_WORK}
        return sum(work.get(name, 0.0) for name in _OF_IMAGES) / sum(work.values())

    step_s = fmean(size / report["samples_per_s"] for report in reports)
    of_images = fmean(share(report["stages"]) for report in reports) if unique_images else 0.0
    return step_s * of_images / max(1.0, unique_images), step_s * (1 - of_images) / size


def config_of_runs(sampled: SampledKeys, folder: Path) -> Config:
    """Make the configuration of a few steps on a part of the samples, which write as little as they can.

    A small store is drawn in the place of the own one; images that are not in it are zeros, which cost the same. ID
    tables have no more rows than such a run could fill.
    """
    _copy_samples(sampled, folder / "samples" / "train", _STEPS * LARGEST_MEASURED)
    keys = sampled.images.keys_of(range(min(sampled.images.num_samples, _STEPS * LARGEST_MEASURED)))
    draw_store(folder / "features", sampled.snapshot.info, np.unique(np.concatenate(keys)))
    model = sampled.config.model
    places = {"samples": str(folder / "samples"), "store": str(folder / "features"), "cache_dir": str(folder / "cache")}
    never = {"eval_every": None, "early_stopping": None, "checkpoint_every": None, "checkpoint_every_s": None}
    changes: dict[str, dict[str, Any]] = {
        "data": {
            **places,
            "store_version": None,
            "missing": "zeros",
            "train_days": None,
            "test_days": [],
            "validation_days": 0,
        },
        "model": {"tables": {name: _as_small(each) for name, each in model.tables.items()}},
        "train": {"epochs": _STEPS, "max_steps": _STEPS, **never},
        "run": {"resume": None, "warm_start": None, "overwrite": False},
    }
    return sampled.config.changed(**changes)


def _as_small(table: TableConfig) -> TableConfig:
    if isinstance(table, int):
        return min(table, _MOST_TABLE_ROWS)
    return table.model_copy(update={"max_rows": min(table.max_rows, _MOST_TABLE_ROWS)})


def draw_store(folder: Path, info: StoreInfo, keys_U: Int64Array) -> FeatureStore:
    """Make a store of drawn features for `keys_U`, or as many of them as a twentieth of the memory holds."""
    small = StoreInfo(num_shards=_SHARDS, dim=info.dim, dtype=info.dtype, extractor=info.extractor)
    store = FeatureStore.create(folder, small)
    keys_U = keys_U[: max(1, int(_DRAWN_OF_MEMORY * physical_memory_bytes() / small.row_bytes))]
    drawn = np.random.default_rng(0).standard_normal((min(len(keys_U), _ROWS_A_PUT), info.dim), dtype=np.float32)
    values_ND = to_bits(np.maximum(drawn, 0), info.dtype)
    for start in range(0, len(keys_U), _ROWS_A_PUT):
        part_U = keys_U[start : start + _ROWS_A_PUT]
        store.put(FeatureRows.of([f"drawn/{key}" for key in part_U], values_ND[: len(part_U)], keys=part_U))
    return store


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
            f"a measurement did not end within {_TIMEOUT_S} s; give a smaller --global-batch-size"
        ) from failure
    for each in done:
        if each.returncode != 0:
            errors = [text.partition("error: ")[2] for text in each.stderr.splitlines() if "error: " in text]
            said = errors[0] if errors else "\n".join((each.stderr or each.stdout).strip().splitlines()[-5:])
            raise PlanError(f"measuring this machine failed ({len(commands)} processes): {said}")
    return [each.stdout for each in done]


def widths(config: Config, sampled: SampledKeys) -> Widths:
    """Return the bytes of what travels, from the schema, the model's settings and the store."""
    model, dim, fields = config.model, sampled.snapshot.info.dim, layers.used_fields(sampled.schema, config.model)
    (image_width,) = widths_of_stores(fields, model).values()
    id_widths = [shape.width for shape in table_shapes(fields, model)]
    with torch.device("meta"):
        networks = nets.build_model(sampled.schema, model), EmbeddingModel(dim, model.embed_hidden, image_width)
    dense = sum(parameter.numel() for network in networks for parameter in network.parameters())
    return Widths(image_width * _FLOAT_BYTES, fmean(id_widths or [0]) * _FLOAT_BYTES, dense * _FLOAT_BYTES)


def stored_bytes(config: Config, sampled: SampledKeys) -> StoredBytes:
    """Return the contents of memory, the store's rows and all ID tables with optimiser state, and its size."""
    snapshot, shapes = sampled.snapshot, table_shapes(layers.used_fields(sampled.schema, config.model), config.model)
    state = state_of(config.optim)
    return StoredBytes(
        feature_bytes=snapshot.num_rows * snapshot.info.row_bytes,
        shards=snapshot.info.num_shards,
        table_bytes=sum(owned_bytes(shape, 0, 1, state, torch.float32) for shape in shapes),
        table_shards=config.model.table_shards,
        machine_memory_bytes=physical_memory_bytes(),
        copied=config.train.checkpoint_beside,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = connect()
    found = measure_collectives(ranks)
    if ranks.rank == 0:
        sys.stdout.write(json.dumps(found) + "\n")
    ranks.close()
