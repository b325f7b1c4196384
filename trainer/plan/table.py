"""The plan: a row of costs for each number of ranks, the number to take, and how both are printed."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from featurestore.console.output import print_line, print_table
from trainer.plan.cost import BatchCounts, Machine, StepCost, Widths, step_cost

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
    """The rows of all numbers of ranks, the number to take (None: no row fits into memory), and all assumptions."""

    title: str
    samples: int
    """Of an epoch."""
    rows: tuple[RankPlan, ...]
    recommended_ranks: int | None
    advice: tuple[str, ...]
    """The recommendation and its reason, then what to change."""
    assumptions: tuple[str, ...]


def build(
    title: str,
    counts_of: Callable[[int], BatchCounts],
    ranks: Sequence[int],
    widths: Widths,
    machine_of: Callable[[int], Machine],
    stored: StoredBytes,
    samples: int,
    assumptions: Sequence[str],
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
    return TrainingPlan(title, samples, tuple(rows), recommended, (reason, *advice), tuple(assumptions))


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
    values = dataclasses.asdict(plan)
    rows = {str(row.pop("ranks")): row for row in values.pop("rows")}
    return values | {"ranks": rows}


def show(plan: TrainingPlan, console: Console) -> None:
    """Print the rows, then the recommendation and the assumptions."""
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
    for title, lines in (("Recommended", plan.advice), ("Taken for granted", plan.assumptions)):
        print_line(console, title, style="bold")
        for line in lines:
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
