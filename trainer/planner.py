"""The planner: time and memory of a trained run on more ranks, and how many ranks to use.

Speeds are those of the run's report: machines are assumed to be like that of the run, with as many ranks on each. Keys
are counted in one global batch of its samples, cut as for each number of ranks. The rest is computed.

Letters of shapes: P ranks, U unique keys that a rank asks for, M rows of a field.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from rich.filesize import decimal

from featurestore.console.output import print_line, print_rows, text_console
from featurestore.keys import Int64Array, owned_shards, owner_of, shard_of
from featurestore.lookup.embedding import EmbeddingModel
from featurestore.lookup.rowfiles import physical_memory_bytes
from featurestore.published.paths import RunPath
from featurestore.store import Snapshot
from featurestore.text import count_text
from trainer.comm import SoloComm
from trainer.engine.wiring import table_shapes, widths_of_stores
from trainer.errors import ConfigError
from trainer.ids.optimizers import state_of
from trainer.ids.shards import owned_bytes
from trainer.models import layers, nets
from trainer.problems import Problem
from trainer.runs.folder import report_of
from trainer.runs.open import train_reader
from trainer.runs.saved import TRAIN, SavedRun, read_run
from trainer.samples.index import open_index
from trainer.samples.reader import Batch
from trainer.schema.fields import Field
from trainer.stages import AHEAD, WAIT

KEY_BYTES = 8
_FLOAT_BYTES = 4
_OF_IMAGES = ("embed images", "embed backward")
_COLLECTIVES = ("exchange vectors", "exchange gradients", "wait for the loss", "reduce gradients")
_CALLS = 3
"""Collectives that a step waits for: those of vectors, of their gradients, and of dense gradients."""
LATENCY_S = 5e-5
"""Additional seconds of a message between machines."""
MOST_OF_MEMORY = 0.8
"""Share of a machine's memory for its ranks."""
LEAST_EFFICIENCY = 0.5
"""Least efficiency, per rank, of a recommended number of ranks."""
PROGRAM_BYTES = 2 * 2**30
"""Memory of a rank besides features and ID rows: Python and torch (.6 GB), batches that are read ahead, activations."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Times of a rank's work, and speed of the network between machines."""

    image_s: float
    """Seconds of E, forward and backward, per unique image of an owner."""
    sample_s: float
    """Seconds of the rest of a step, per sample of a rank."""
    call_s: float
    """Seconds of a collective between the ranks of one machine."""
    link_bytes_per_s: float
    """Bandwidth of a machine, each way; its ranks share it."""
    ranks_per_machine: int

    def collective_s(self, ranks: int, messages: int, bytes_out: float) -> float:
        """Return the seconds of a collective by Hockney's model. `bytes_out`: of the rank that sends most, to others.

        An alltoall is P - 1 messages of each rank; a ring allreduce 2 (P - 1) (Thakur, Rabenseifner and Gropp,
        "Optimization of collective communication operations in MPICH", 2005).
        """
        local = min(self.ranks_per_machine, ranks)
        if ranks in (1, local):
            return self.call_s if ranks > 1 else 0.0
        away = bytes_out * (ranks - local) / (ranks - 1)
        return self.call_s + messages * LATENCY_S + away * local / self.link_bytes_per_s


@dataclass(frozen=True)
class Source:
    """An E over a store, or an ID table, and its fields: a key in two of them is asked for once."""

    fields: tuple[str, ...]
    width: int
    shards_of: Callable[[Int64Array], Int64Array]
    is_store: bool

    def owned_by(self, ranks: int, keys_U: Int64Array) -> Int64Array:
        """Count the keys of each owner, (P,)."""
        return np.bincount(owner_of(self.shards_of(keys_U), ranks), minlength=ranks)


@dataclass(frozen=True)
class BatchCounts:
    """Counts of the keys of one global batch that ranks ask for and own."""

    images: int
    """Unique images of the batch."""
    most_images: int
    """Unique images of the busiest owner."""
    keys: float
    """Unique keys that a rank asks for, the mean over ranks."""
    vector_bytes: float
    """Bytes of the vectors that the busiest owner answers with, its own among them."""


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """The plan for one number of ranks. `efficiency`: samples/s of a rank over those of one rank alone."""

    ranks: int
    images: int
    """Unique images of a global batch."""
    rank_bytes: float
    """Features and ID rows of the rank that has most, and the copy of these while a checkpoint is written."""
    machine_bytes: float
    """Memory that a machine needs for its ranks: features, ID rows and programs; a fifth stays free."""
    bytes_sent: float
    """Bytes that leave the busiest rank in a step: keys, vectors, their gradients, dense gradients."""
    step_s: float
    samples_per_s: float
    epoch_s: float
    efficiency: float


@dataclass(frozen=True)
class TrainingPlan:
    """The rows of all numbers of ranks, and the number to take (None: no row fits into memory)."""

    title: str
    rows: tuple[RankPlan, ...]
    recommended_ranks: int | None
    advice: str


@dataclass(frozen=True)
class Planner:
    """A trained run, a global batch of its samples, and the speed of its ranks. `samples`: those of an epoch."""

    saved: SavedRun
    snapshots: Mapping[str, Snapshot]
    batch: Batch
    samples: int
    speed: Speed

    def plan(self, ranks: Sequence[int]) -> TrainingPlan:
        """Compute the rows of these numbers of ranks, and recommend one."""
        rows = tuple(self.row(each) for each in ranks)
        data, link = self.saved.config.data, self.speed.link_bytes_per_s * 8 / 1e9
        title = (
            f"{data.samples}, {self.batch.num_samples:,} samples a step, as fast as {self.saved.folder}; "
            f"machines of {self.speed.ranks_per_machine} ranks, joined by {link:g} Gbit/s"
        )
        return TrainingPlan(title, rows, *recommend(rows, physical_memory_bytes()))

    def row(self, ranks: int) -> RankPlan:
        """Compute the row of a number of ranks."""
        counts, size, away = count(self.batch, self.sources, ranks), self.batch.num_samples, (ranks - 1) / ranks
        step_s, rank_bytes = self._step_s(counts, ranks), self.rank_bytes(ranks)
        return RankPlan(
            ranks=ranks,
            images=counts.images,
            rank_bytes=rank_bytes,
            machine_bytes=min(ranks, self.speed.ranks_per_machine) * (rank_bytes + PROGRAM_BYTES) / MOST_OF_MEMORY,
            bytes_sent=away * (KEY_BYTES * counts.keys + 2 * counts.vector_bytes + 2 * self.dense_bytes),
            step_s=step_s,
            samples_per_s=size / step_s,
            epoch_s=self.samples / size * step_s,
            efficiency=1.0 if ranks == 1 else self.row(1).step_s / step_s / ranks,
        )

    def _step_s(self, counts: BatchCounts, ranks: int) -> float:
        """Compute the seconds of a step: what runs ahead, as reading and the exchange of keys, counts for nothing."""
        speed, away = self.speed, (ranks - 1) / ranks
        vectors_s = speed.collective_s(ranks, ranks - 1, away * counts.vector_bytes)
        dense_s = speed.collective_s(ranks, 2 * (ranks - 1), 2 * away * self.dense_bytes)
        computing_s = speed.image_s * counts.most_images + speed.sample_s * self.batch.num_samples / ranks
        return computing_s + 2 * vectors_s + dense_s

    @cached_property
    def sources(self) -> list[Source]:
        """List the keys that the ranks ask for: the E of each store, and the ID tables."""
        model, found = self.saved.config.model, list[Source]()
        for store, width in widths_of_stores(self._fields, model).items():
            names = tuple(each.name for each in self._fields if each.kind == "content" and each.store_name == store)
            shards_of = partial(shard_of, num_shards=self.snapshots[store].info.num_shards)
            found.append(Source(names, width, shards_of, is_store=True))
        for shape in table_shapes(self._fields, model):
            names = tuple(each.name for each in self._fields if each.is_id and each.table_name == shape.name)
            found.append(Source(names, shape.width, shape.shards_of, is_store=False))
        return found

    @property
    def _fields(self) -> tuple[Field, ...]:
        return layers.used_fields(self.saved.schema, self.saved.config.model)

    @cached_property
    def dense_bytes(self) -> int:
        """Return the bytes of the gradients of all parameters that every rank holds."""
        model = self.saved.config.model
        with torch.device("meta"):
            networks: list[torch.nn.Module] = [nets.build_model(self.saved.schema, model)]
            for store, width in widths_of_stores(self._fields, model).items():
                networks.append(EmbeddingModel(self.snapshots[store].info.dim, model.embed_hidden, width))
        return _FLOAT_BYTES * sum(each.numel() for network in networks for each in network.parameters())

    def rank_bytes(self, ranks: int) -> float:
        """Return the memory that stores and tables take on the first rank, which has most of them."""
        config, features = self.saved.config, 0.0
        for snapshot in self.snapshots.values():
            shards = snapshot.info.num_shards
            features += snapshot.num_rows * snapshot.info.row_bytes * len(owned_shards(shards, 0, ranks)) / shards
        shapes, state = table_shapes(self._fields, config.model), state_of(config.optim)
        tables = sum(owned_bytes(shape, 0, ranks, state, torch.float32) for shape in shapes)
        return features + tables * (2 if config.train.checkpoint_beside else 1)


def count(batch: Batch, sources: Sequence[Source], ranks: int) -> BatchCounts:
    """Count the keys of a global batch that is cut into the slices of `ranks` ranks."""
    asked, sent_P, images_P = 0, np.zeros(ranks), np.zeros(ranks, np.int64)
    for source in sources:
        of_ranks = [np.unique(keys_of(batch, source.fields, rank, ranks)) for rank in range(ranks)]
        for keys_U in of_ranks:
            asked += len(keys_U)
            sent_P += _FLOAT_BYTES * source.width * source.owned_by(ranks, keys_U)
        if source.is_store:
            images_P += source.owned_by(ranks, np.unique(np.concatenate(of_ranks)))
    return BatchCounts(int(images_P.sum()), int(images_P.max()), asked / ranks, float(sent_P.max()))


def keys_of(batch: Batch, fields: Sequence[str], rank: int, ranks: int) -> Int64Array:
    """Return the keys of these fields in a rank's slice of a global batch, with repetitions.

    A group that is cut has all keys of its user on both sides.
    """
    first, last = (batch.num_samples * each // ranks for each in (rank, rank + 1))
    groups_B = batch.group_of_sample_B[first:last]
    found = [np.empty(0, np.int64)]
    for name in fields if len(groups_B) else ():
        jagged = batch.fields[name]
        of_user = len(jagged.lengths_M) != batch.num_samples
        start, stop = (int(groups_B[0]), int(groups_B[-1]) + 1) if of_user else (first, last)
        ends_M = np.cumsum(jagged.lengths_M, dtype=np.int64)
        found.append(jagged.values_N[int(ends_M[start] - jagged.lengths_M[start]) : int(ends_M[stop - 1])])
    return np.concatenate(found)


def open_planner(folder: RunPath, batch_size: int | None, link_bytes_per_s: float) -> Planner:
    """Open the inputs of a plan for a trained run, with a batch of its samples, by default as large as its own.

    Images are those of the snapshots that it was trained on. Raises TrainerError, FeatureStoreError.
    """
    saved, report = read_run(folder), report_of(folder)
    if report is None or not report["samples_per_s"]:
        raise ConfigError(Problem.RUN_WITHOUT_FIGURES, folder)
    config = saved.config
    if batch_size is not None:
        config = config.changed(data={"global_batch_size": batch_size})
    index = open_index(SoloComm(), config.data.samples, TRAIN, saved.schema, config.data.train_days)
    if config.data.global_batch_size > index.num_samples:
        raise ConfigError(Problem.BATCH_OVER_ALL_SAMPLES, config.data.global_batch_size, index.num_samples)
    return Planner(
        saved=saved,
        snapshots={place.name: saved.trained_on(place) for place in saved.places},
        batch=next(train_reader(config, index, saved.schema).batches()),
        samples=index.num_samples,
        speed=speed_of(report, link_bytes_per_s),
    )


def speed_of(report: Mapping[str, Any], link_bytes_per_s: float) -> Speed:
    """Share the steps of a run on one machine out among images, samples and collectives, as its stages say."""
    ranks, stages = report["num_ranks"], {name: each["median_ms"] for name, each in report["stages"].items()}
    own = {name: ms for name, ms in stages.items() if name not in AHEAD and name != WAIT}
    samples = report["samples"] / report["steps"]
    second = samples / report["samples_per_s"] / sum(own.values())  # of a step, for each millisecond of its stages
    images_s, calls_s = (second * sum(own.get(name, 0.0) for name in names) for names in (_OF_IMAGES, _COLLECTIVES))
    calls_s = calls_s if ranks > 1 else 0.0
    return Speed(
        image_s=images_s / max(1.0, report["images_per_step"] / ranks),
        sample_s=(second * sum(own.values()) - images_s - calls_s) / (samples / ranks),
        call_s=calls_s / _CALLS,
        link_bytes_per_s=link_bytes_per_s,
        ranks_per_machine=ranks,
    )


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
        f"Take {count_text(row.ranks, 'rank')}: {why} at least {LEAST_EFFICIENCY:.0%} efficient "
        f"({row.efficiency:.0%}). A machine needs {row.machine_bytes / 1e9:,.3g} GB of memory."
    )


def show(plan: TrainingPlan) -> None:
    """Print the rows, then the recommendation."""
    names = ["ranks", "images", "memory of a rank", "sent in a step", "ms a step", "samples/s", "min an epoch"]
    names, lines = [*names, "efficiency"], []
    for row in plan.rows:
        sizes = (decimal(round(each), precision=2) for each in (row.rank_bytes, row.bytes_sent))
        times = (f"{1e3 * row.step_s:,.1f}", f"{row.samples_per_s:,.0f}", f"{row.epoch_s / 60:,.1f}")
        lines.append([str(row.ranks), f"{row.images:,}", *sizes, *times, f"{row.efficiency:.0%}"])
    best = next((number for number, row in enumerate(plan.rows) if row.ranks == plan.recommended_ranks), None)
    print_line(text_console(), plan.title, style="bold")
    print_rows(names, lines, numbers=names, bold=best)
    print_line(text_console(), plan.advice)
