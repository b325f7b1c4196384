"""The cost of a step on ranks and machines.

Every collective is timed with almost nothing in it and with much in it: what a call costs, and what a byte costs.

Every time is a mean over steps.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from featurestore.keys import owner_of, shard_of
from trainer.comm import Comm, connect
from trainer.exchange.routing import Int64
from trainer.samples.reader import Batch

_ROUNDS = 15
_WARM_UP = 3
_SMALL_FLOATS, _LARGE_FLOATS = 64, 2 << 20


def measure(comm: Comm) -> dict[str, float]:
    """Measure seconds of a call, and of a byte that a rank sends, of alltoall and allreduce; called by every rank.

    The slowest rank counts, the median of the rounds. Bytes are those that leave a rank: of an allreduce in a ring,
    2 (P - 1) / P times its values.
    """
    figures: dict[str, float] = {"ranks": comm.size}
    for name, run in {"alltoall": _alltoall, "allreduce": _allreduce}.items():
        call_s = _median_s(comm, lambda run=run: run(comm, _SMALL_FLOATS))  # type: ignore[misc]
        large_s = _median_s(comm, lambda run=run: run(comm, _LARGE_FLOATS))  # type: ignore[misc]
        factor = (1 if name == "alltoall" else 2) * (comm.size - 1) / comm.size
        figures[f"{name}_call_s"] = call_s
        figures[f"{name}_byte_s"] = max(0.0, large_s - call_s) / (4 * _LARGE_FLOATS * factor)
    return figures


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


KEY_BYTES = 8
LANES: tuple[frozenset[str], ...] = (frozenset({"read"}), frozenset({"route", "keys", "gather"}))
"""Stages that need no weights, so that those of step t + 1 run during step t: a thread reads, another one prepares."""


@dataclass(frozen=True)
class KeyCounts:
    """Counts of keys of one kind (images, ids) in one global batch of P ranks."""

    references: float
    """In the whole batch, user fields once per group."""
    asked: float
    """Unique keys of one rank, mean over ranks: what it asks for, and what an owner is asked for on average."""
    served: float
    """Keys that the busiest owner is asked for; the same key once for each rank that asks."""
    unique: float
    """In the whole batch."""
    owned: float
    """Unique keys of the busiest owner."""


@dataclass(frozen=True)
class BatchCounts:
    """What one step of a global batch of `samples` on `ranks` works on. `decoded`: samples that each rank decodes."""

    samples: int
    ranks: int
    decoded: float
    images: KeyCounts
    ids: KeyCounts


@dataclass(frozen=True)
class StageCost:
    """What one stage of a step takes of a rank; `busy_s` is processor time."""

    seconds: float
    busy_s: float


@dataclass(frozen=True)
class StageRate:
    """A stage of the step, timed at two sizes: a constant and so much per unit; `cores` were busy meanwhile."""

    fixed_s: float
    unit_s: float
    cores: float = 1.0

    def seconds(self, units: float) -> float:
        """Return the wall time of `units`."""
        return self.fixed_s + self.unit_s * units

    def cost(self, units: float) -> StageCost:
        """Return the wall time and the processor time of `units`."""
        return StageCost(self.seconds(units), self.seconds(units) * self.cores)


@dataclass(frozen=True)
class StageRates:
    """The stages of one rank without other ranks, measured with the machine as full as it will be."""

    read: StageRate
    """Per sample decoded: Parquet to a batch."""
    route: StageRate
    """Per sample of the rank: unique, owners, unique again, everything of the key exchange but its wire."""
    gather: StageRate
    """Per image: its feature out of the mapped store."""
    embed: StageRate
    """Per image: E, forward and backward."""
    worker: StageRate
    """Per sample of the rank: worker model forward and backward, the way from unique vectors to the batch and back."""
    rows: StageRate
    """Per unique id: its vector, and its step of Adam."""
    jitter: float = 0.0
    """Standard deviation of a rank's step over its mean: every step waits for the slowest rank."""


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
    """Any collective, however little it moves, measured between ranks of one machine."""
    latency_s: float
    """More for each message to another rank when there are several machines."""
    link_bytes_per_s: float
    """Of a machine, each way."""
    local_bytes_per_s: float
    """Of a rank, between ranks of one machine: also the most that its software moves."""
    ranks_per_machine: int = 1

    def alltoall_s(self, ranks: int, bytes_out: float) -> float:
        """Return the seconds of an alltoall. `bytes_out`: what leaves a rank, or comes to it, whichever is more."""
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
    """One machine, whose ranks share its `cores`.

    `interference`: how much longer a step of the real loop takes than its stages alone would say, measured at one rank:
    threads that run at the same time fight for memory and processor caches.
    """

    rates: StageRates
    network: NetworkSpeed
    cores: int
    interference: float = 1.0


@dataclass(frozen=True)
class StepCost:
    """The bytes and seconds of one step. Bytes leave a rank, mean over ranks."""

    seconds: float
    samples_per_s: float
    bytes_by_part: Mapping[str, float]
    stages: Mapping[str, StageCost]

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
    """Compute the step of a global batch. Every step waits for the busiest owner."""
    sizes = bytes_by_part(counts, widths)
    stages = {**_computed(counts, machine), **_sent(counts, sizes, machine.network)}
    seconds = step_seconds(stages, counts.ranks, machine)
    return StepCost(seconds, counts.samples / seconds, sizes, stages)


def step_seconds(stages: Mapping[str, StageCost], ranks: int, machine: Machine) -> float:
    """Return the longest of the lanes, the other stages, and the processor time of all ranks over a machine's cores.

    These are the two bounds of Brent's theorem (The parallel evaluation of general arithmetic expressions, 1974), the
    span and the work. Of ranks whose steps vary independently, the slowest counts.
    """
    lanes = [sum(stage.seconds for name, stage in stages.items() if name in lane) for lane in LANES]
    own = sum(stage.seconds for name, stage in stages.items() if not any(name in lane for lane in LANES))
    local = min(ranks, machine.network.ranks_per_machine)
    busy = sum(stage.busy_s for stage in stages.values()) * local / machine.cores
    wait = machine.rates.jitter * highest_of(ranks)
    return max(*lanes, own, busy) * machine.interference * (1 + wait)


def _computed(counts: BatchCounts, machine: Machine) -> dict[str, StageCost]:
    """Return the stages that a rank computes; the images are those of the busiest owner."""
    rates, own_samples = machine.rates, counts.samples / counts.ranks
    units = {
        "read": (rates.read, counts.decoded),
        "route": (rates.route, own_samples),
        "gather": (rates.gather, counts.images.owned),
        "embed": (rates.embed, counts.images.owned),
        "worker": (rates.worker, own_samples),
        "rows": (rates.rows, counts.ids.owned),
    }
    return {name: rate.cost(count) for name, (rate, count) in units.items()}


def _sent(counts: BatchCounts, sizes: Mapping[str, float], network: NetworkSpeed) -> dict[str, StageCost]:
    """Return the stages on the wire: the busiest owner sends more vectors than the mean."""
    ranks, dense = counts.ranks, sizes["dense gradients"]
    image_skew, id_skew = (k.served / k.asked if k.asked else 1.0 for k in (counts.images, counts.ids))
    vectors = image_skew * sizes["image vectors"] + id_skew * sizes["id vectors"]
    keys_s = network.alltoall_s(ranks, max(image_skew, id_skew) * sizes["keys"])
    vectors_s = network.alltoall_s(ranks, vectors)
    dense_s = network.allreduce_s(ranks, dense * ranks / max(1, 2 * (ranks - 1)))
    # What two ranks of a machine send each other, its processor copies; a network card works alone.
    busy_per_byte_s = 1 / network.local_bytes_per_s if ranks <= network.ranks_per_machine else 0.0
    return {
        "keys": StageCost(keys_s, sizes["keys"] * busy_per_byte_s),
        "vectors": StageCost(vectors_s, vectors * busy_per_byte_s),
        "gradients": StageCost(vectors_s, vectors * busy_per_byte_s),
        "dense gradients": StageCost(dense_s, dense * busy_per_byte_s),
    }


def highest_of(count: int) -> float:
    """Return the expected highest of `count` standard normal draws: 0 for one, 1.87 for twenty.

    Blom's approximation of normal order statistics (Statistical Estimates and Transformed Beta-Variables, 1958).
    """
    return 0.0 if count == 1 else NormalDist().inv_cdf((count - 0.375) / (count + 0.25))


def owner_skew(unique: float, num_ranks: int, num_shards: int) -> float:
    """Return the expected keys of the busiest owner over the mean, for `unique` keys that are hashed into shards.

    Shards are dealt out in turn, so some ranks have one more than others, which no number of keys evens out; among the
    ranks that have most, the number of keys is binomial, and the highest of them counts. Ranks without a shard idle.
    """
    if num_ranks == 1 or unique <= 0:
        return 1.0
    most = math.ceil(num_shards / num_ranks)
    ranks_with_most = num_shards - (most - 1) * num_ranks
    share = most / num_shards
    deviation = math.sqrt(unique * share * (1 - share))
    highest = unique * share + deviation * highest_of(min(ranks_with_most, num_ranks))
    return min(highest, unique) * num_ranks / unique


_SPANS = 8


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

    def keys_of(self, span: range) -> list[Int64]:
        """Return the keys of each source in samples `span`, with repetitions; a cut group has its user fields."""
        return [np.concatenate([self._values(name, span)[0] for name in names]) for names in self.sources]

    def references(self) -> float:
        """Return the keys of a sample, user fields once per group."""
        return sum(len(keys_N) for keys_N in self.keys_of(range(self.num_samples))) / self.num_samples

    def spans(self, samples: int) -> Iterator[range]:
        """Yield up to eight spans of `samples` samples, evenly spread, none of them overlapping another."""
        count = min(_SPANS, self.num_samples // samples)
        for number in range(count):
            start = (self.num_samples - samples) * number // max(1, count - 1)
            yield range(start, start + samples)

    def keys(self, samples: int, ranks: int) -> KeyCounts:
        """Count the keys of global batches that are cut into the slices of `ranks` ranks, mean over the batches."""
        found = np.array([_of_batch(self, span, ranks) for span in self.spans(samples)]).mean(axis=0)
        asked, served, unique, owned = (float(each) for each in found)
        return KeyCounts(self.references() * samples, asked, served, unique, owned)

    def _values(self, name: str, span: range) -> tuple[Int64, Int64]:
        """Return the values of a field, and the group of each."""
        jagged, group_B = self.batch.fields[name], self.batch.group_of_sample_B
        rows = range(int(group_B[span.start]), int(group_B[span.stop - 1]) + 1)
        of_user = name in self.user_fields
        if not of_user:
            rows = span
        ends_M = np.cumsum(jagged.lengths_M, dtype=np.int64)
        lengths_M = jagged.lengths_M[rows.start : rows.stop]
        first = int(ends_M[rows.start]) - int(jagged.lengths_M[rows.start])
        group_M = np.arange(rows.start, rows.stop) if of_user else group_B[rows.start : rows.stop]
        return jagged.values_N[first : int(ends_M[rows.stop - 1])], np.repeat(group_M, lengths_M)


def _of_batch(drawn: DrawnSamples, span: range, ranks: int) -> tuple[float, float, float, float]:
    """Count keys asked by a rank, keys that the busiest owner is asked for, unique keys, those of the busiest owner."""
    served_P, owned_P = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    for rank in range(ranks):
        part = range(span.start + len(span) * rank // ranks, span.start + len(span) * (rank + 1) // ranks)
        if part:
            for keys_N in drawn.keys_of(part):
                served_P += _by_owner(np.unique(keys_N), drawn.num_shards, ranks)
    for keys_N in drawn.keys_of(span):
        owned_P += _by_owner(np.unique(keys_N), drawn.num_shards, ranks)
    return float(served_P.sum()) / ranks, float(served_P.max()), float(owned_P.sum()), float(owned_P.max())


def _by_owner(keys_U: Int64, num_shards: int, ranks: int) -> Int64:
    return np.bincount(owner_of(shard_of(keys_U, num_shards), ranks), minlength=ranks)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = connect()
    found = measure(ranks)
    if ranks.rank == 0:
        sys.stdout.write(json.dumps(found) + "\n")
    ranks.close()
