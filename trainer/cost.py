"""The plan: the cost of a step on ranks and machines, a row of it for each number of ranks, and the number to take.

Costs are bytes that travel, and seconds, each a mean over steps.

As a program on ranks, it measures collectives: horovodrun -np 2 python -m trainer.cost
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from featurestore.console.output import print_line, print_table
from trainer.comm import Comm, connect

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
_SKEW_NOTICE = 1.05
_DECODE_NOTICE = 1.31


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
    """The recommendation and its reason, then what to change."""


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
        row = RankPlan(
            ranks=count,
            counts=counts,
            machine=machine,
            cost=cost,
            efficiency=cost.samples_per_s / (base.samples_per_s * count),
            epoch_s=samples / cost.samples_per_s,
            rank_bytes=rank_bytes,
            machine_bytes=local * (rank_bytes + PROGRAM_BYTES) / MOST_OF_MEMORY,
        )
        rows.append(row)
        advice += advise(row, stored)
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


def advise(row: RankPlan, stored: StoredBytes) -> list[str]:
    """Return advice on the streams of samples and on shards."""
    lines = []
    if (decoded := row.counts.decoded * row.ranks / row.counts.samples) > _DECODE_NOTICE:
        lines.append(
            f"{_ranks(row.ranks)}: a rank decodes {decoded:.2g} times its own samples, as ranks share streams of them. "
            f"Set data.shuffle_streams to a multiple of {row.ranks}, and write ten row groups or more for each rank."
        )
    for name, keys, shards, change in (
        ("images", row.counts.images, stored.shards, "make the store with --num-shards"),
        ("ids", row.counts.ids, stored.table_shards, "set model.table_shards to"),
    ):
        skew = keys.skew(row.ranks)
        # Where keys alone are uneven, more shards do not help.
        if min(skew, most_shards(shards, row.ranks) * row.ranks / shards) > _SKEW_NOTICE:
            lines.append(
                f"{_ranks(row.ranks)}: the busiest owner has {skew - 1:.0%} more {name} than the mean, as {shards} "
                f"shards do not divide evenly: {change} {even_shards(row.ranks)}."
            )
    return lines


def most_shards(num_shards: int, ranks: int) -> int:
    """Count the shards of the rank that has most."""
    return -(-num_shards // ranks)


def even_shards(ranks: int) -> int:
    """Return the smallest power of two of shards of which no rank has more than 5 % above the mean."""
    shards = 1
    while most_shards(shards, ranks) * ranks > _SKEW_NOTICE * shards:
        shards *= 2
    return shards


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = connect()
    found = measure_collectives(ranks)
    if ranks.rank == 0:
        sys.stdout.write(json.dumps(found) + "\n")
    ranks.close()
