"""The plan: a row of costs for each number of ranks, the number to take, and how both are printed."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from featurestore.console.output import print_line, print_table
from trainer.config.options import Section, validated
from trainer.errors import ConfigError
from trainer.files import read_mapping
from trainer.plan.cost import (
    BatchCounts,
    KeyCounts,
    Machine,
    NetworkSpeed,
    StageRate,
    StageRates,
    StepCost,
    Widths,
    owner_skew,
    step_cost,
)

PAPER = Path(__file__).parent.parent / "presets" / "plan-paper.yaml"
MOST_OF_MEMORY = 0.8
"""Of a machine's, for what its ranks hold."""
LEAST_EFFICIENCY = 0.5
"""More ranks are recommended as long as each does at least so much of what it would do alone."""
PROGRAM_BYTES = 2 * 2**30
"""Memory of a rank besides features and ID rows: Python and torch (.6 GB), batches that are read ahead, activations."""
_SKEW_NOTICE = 1.05
_DECODE_NOTICE = 1.31


@dataclass(frozen=True)
class StoredBytes:
    """What ranks hold: the feature store and the ID tables. `table_bytes` is of all tables, with Adam's state."""

    feature_bytes: int
    """Of all rows of the store."""
    shards: int
    table_bytes: int
    table_shards: int
    machine_memory_bytes: int | None = None
    """Of a machine, where it is known."""
    copied: bool = False
    """Whether checkpoints are written during the training, from a copy of the ID rows."""

    def rank_bytes(self, ranks: int) -> float:
        """Return the bytes of features and ID rows, and of the copy of these, on the rank that has most."""
        features = self.feature_bytes * most_shards(self.shards, ranks) / self.shards
        tables = self.table_bytes * most_shards(self.table_shards, ranks) / self.table_shards
        return features + tables * (2 if self.copied else 1)


@dataclass(frozen=True)
class RankPlan:
    """The plan for one number of ranks. `efficiency`: samples/s over those of the base, each divided by its ranks."""

    ranks: int
    counts: BatchCounts
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
    base_ranks: int
    samples: float
    """Of an epoch."""
    rows: tuple[RankPlan, ...]
    machines: Mapping[int, Machine]
    """By ranks on one machine."""
    recommended_ranks: int | None
    advice: tuple[str, ...]
    """The recommendation and its reason, then what to change."""
    assumptions: tuple[str, ...]


def build(
    title: str,
    counts_of: Callable[[int], BatchCounts],
    ranks: Sequence[int],
    base_ranks: int,
    widths: Widths,
    machines: Mapping[int, Machine],
    stored: StoredBytes,
    samples: float,
    assumptions: Sequence[str],
    warnings: Sequence[str] = (),
) -> TrainingPlan:
    """Make the plan for each of `ranks`; `machines` has one for every number of ranks that share a machine.

    `warnings`: lines that come before the advice.
    """
    base = step_cost(counts_of(base_ranks), widths, machines[min(base_ranks, max(machines))])
    rows, advice = [], []
    for count in ranks:
        local, counts = min(count, max(machines)), counts_of(count)
        cost, rank_bytes = step_cost(counts, widths, machines[local]), stored.rank_bytes(count)
        row = RankPlan(
            ranks=count,
            counts=counts,
            cost=cost,
            efficiency=cost.samples_per_s * base_ranks / (base.samples_per_s * count),
            epoch_s=samples / cost.samples_per_s,
            rank_bytes=rank_bytes,
            machine_bytes=local * (rank_bytes + PROGRAM_BYTES) / MOST_OF_MEMORY,
        )
        rows.append(row)
        advice += advise(row, stored)
        if count > base_ranks and cost.samples_per_s < base.samples_per_s:
            times = cost.samples_per_s / base.samples_per_s
            advice.append(f"{count} ranks are slower than {base_ranks}: they make {times:.2g} times its samples/s.")
    recommended, reason = recommend(rows, stored.machine_memory_bytes)
    return TrainingPlan(
        title=title,
        base_ranks=base_ranks,
        samples=samples,
        rows=tuple(rows),
        machines=machines,
        recommended_ranks=recommended,
        advice=(*warnings, reason, *advice),
        assumptions=tuple(assumptions),
    )


def recommend(rows: Sequence[RankPlan], memory_bytes: int | None) -> tuple[int | None, str]:
    """Recommend the most ranks whose efficiency is half or more, of those whose memory a machine has, and say why.

    Where all are less efficient it is the fewest ranks that fit; None where none does.
    """
    fitting = [row for row in rows if memory_bytes is None or row.machine_bytes <= memory_bytes]
    if not fitting:
        least = min(rows, key=lambda row: row.machine_bytes)
        return None, (
            f"None of {', '.join(str(row.ranks) for row in rows)} ranks fits: with {least.ranks} a machine needs "
            f"{least.machine_bytes / 1e9:,.3g} GB and this one has {(memory_bytes or 0) / 1e9:,.3g} GB. Plan with more "
            "--ranks, or with a smaller store (python -m featurestore remake)."
        )
    efficient = [row for row in fitting if row.efficiency >= LEAST_EFFICIENCY]
    row = max(efficient, key=lambda row: row.ranks) if efficient else min(fitting, key=lambda row: row.ranks)
    why = "the most that are" if efficient else "the fewest, as none is"
    return row.ranks, (
        f"Take {_ranks(row.ranks)}: {why} at least {LEAST_EFFICIENCY:.0%} efficient ({row.efficiency:.0%}). "
        f"A machine needs {row.machine_bytes / 1e9:,.3g} GB of memory."
    )


def advise(row: RankPlan, stored: StoredBytes) -> list[str]:
    """Say what to change about streams of samples and about shards."""
    lines, images, ids = [], row.counts.images, row.counts.ids
    if (decoded := row.counts.decoded * row.ranks / row.counts.samples) > _DECODE_NOTICE:
        lines.append(
            f"{_ranks(row.ranks)}: a rank decodes {decoded:.2g} times its own samples, as ranks share streams of them. "
            f"Set data.shuffle_streams to a multiple of {row.ranks}, and write ten row groups or more for each rank."
        )
    for name, keys, shards, change in (
        ("images", images, stored.shards, "make the store with --num-shards"),
        ("ids", ids, stored.table_shards, "set model.table_shards to"),
    ):
        skew = keys.owned * row.ranks / keys.unique if keys.unique else 1.0
        uneven = most_shards(shards, row.ranks) * row.ranks / shards
        if min(skew, uneven) > _SKEW_NOTICE:  # where keys alone are uneven, more shards do not help
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


class PaperKeys(Section):
    """Keys of one kind: references and different ones in a global batch, of which no two nodes ask for the same."""

    references: float
    unique: float
    num_shards: int

    def keys(self, ranks: int) -> KeyCounts:
        """Count the keys of a global batch on `ranks` nodes."""
        asked, skew = self.unique / ranks, owner_skew(self.unique, ranks, self.num_shards)
        return KeyCounts(self.references, asked, asked * skew, self.unique, asked * skew)


class PaperCluster(Section):
    """The paper's cluster, which was not measured; every line of `assumptions` is printed with the plan."""

    title: str
    global_batch_size: int
    ranks: list[int]
    samples: int
    images: PaperKeys
    ids: PaperKeys
    vector_bytes: int
    store_bytes: int
    dense_bytes: int
    reference_ranks: int
    reference_hours: float
    network_gbit: float
    latency_us: float
    call_ms: float
    jitter: float
    assumptions: list[str]

    def counts(self, ranks: int) -> BatchCounts:
        """Count the keys of a global batch on `ranks` nodes."""
        size = self.global_batch_size
        return BatchCounts(size, ranks, size / ranks, self.images.keys(ranks), self.ids.keys(ranks))

    @property
    def widths(self) -> Widths:
        """Return the bytes of what travels."""
        return Widths(self.vector_bytes, self.vector_bytes, self.dense_bytes)

    def machine(self) -> Machine:
        """Derive a node as fast as the reference run says: all of its time but the wire goes with its images."""
        speed = self.network_gbit * 1e9 / 8
        network = NetworkSpeed(self.call_ms / 1e3, self.latency_us / 1e6, speed, speed)
        counts = self.counts(self.reference_ranks)

        def node(per_image_s: float) -> Machine:
            nothing = StageRate(0.0, 0.0, 0.0)
            embed = StageRate(0.0, per_image_s, 0.0)
            return Machine(StageRates(nothing, nothing, nothing, embed, nothing, nothing, self.jitter), network, 1)

        wire_s, one_s = (step_cost(counts, self.widths, node(each)).seconds for each in (0.0, 1.0))
        step_s = self.reference_hours * 3600 * self.global_batch_size / self.samples
        return node((step_s - wire_s) / (one_s - wire_s))


def load_paper() -> PaperCluster:
    """Load the paper's cluster. Raises ConfigError naming the file and the field."""
    return validated(PaperCluster, read_mapping(PAPER, "--paper ", ConfigError), str(PAPER), ConfigError)


def plan_paper(paper: PaperCluster) -> TrainingPlan:
    """Make the plan of the paper's cluster; efficiency is against its smallest number of ranks."""
    machine = paper.machine()
    derived = (
        f"Compute of a node: {machine.rates.embed.unit_s * 1e6:.3g} us per unique image, which is what "
        f"{paper.reference_hours} h on {paper.reference_ranks} nodes leave when the wire is taken off; it falls "
        "with the number of nodes, but for what the busiest owner has more than the mean.",
        f"Network: {paper.network_gbit:g} Gbit/s each way, {paper.latency_us:g} us a message, {paper.call_ms:g} ms a "
        "collective; three alltoalls, one of them hidden behind the step before, and one allreduce a step.",
        f"Steps of a node vary by {paper.jitter:.0%}, and the slowest of P nodes counts.",
    )
    return build(
        title=paper.title,
        counts_of=paper.counts,
        ranks=paper.ranks,
        base_ranks=paper.ranks[0],
        widths=paper.widths,
        machines={1: machine},
        stored=StoredBytes(paper.store_bytes, paper.images.num_shards, 0, paper.ids.num_shards),
        samples=paper.samples,
        assumptions=[*paper.assumptions, *derived],
    )


def as_json(plan: TrainingPlan) -> dict[str, Any]:
    """Return everything in the plan as plain values; `ranks` maps each number of ranks to its row."""
    values = dataclasses.asdict(plan)
    rows = {str(row.pop("ranks")): row for row in values.pop("rows")}
    return values | {"ranks": rows, "machines": {str(local): each for local, each in values["machines"].items()}}


def show(plan: TrainingPlan, console: Console) -> None:
    """Print tables of counts, memory, bytes and times, then what to take and what was taken for granted."""
    print_line(console, plan.title, style="bold")
    for table in (_counts(plan), _costs(plan), _stages(plan)):
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
    if seconds == 0:
        return "-"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 600:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.3g} h"


def _counts(plan: TrainingPlan) -> Table:
    columns = ("ranks", "samples", "images", "of a rank", "images used", "busiest owner", "ids", "ids of a rank")
    table = _table("A global batch", *columns)
    for row in plan.rows:
        images, ids = row.counts.images, row.counts.ids
        skew = images.owned * row.ranks / images.unique if images.unique else 1.0
        counts = (row.counts.samples, images.unique, images.asked, images.references)
        cells = [*(f"{count:,.0f}" for count in counts), f"{skew - 1:+.1%}", f"{ids.unique:,.0f}", f"{ids.asked:,.0f}"]
        table.add_row(str(row.ranks), *cells)
    return table


def _costs(plan: TrainingPlan) -> Table:
    epoch, against = f"epoch of {plan.samples:,.0f}", f"efficiency against {plan.base_ranks}"
    table = _table("Cost", "ranks", "memory of a rank", "sent in a step", "step", "samples/s", epoch, against)
    for row in plan.rows:
        cost, bytes_of = row.cost, (size(row.rank_bytes), size(row.cost.bytes_sent))
        times = (duration(cost.seconds), f"{cost.samples_per_s:,.0f}", duration(row.epoch_s))
        style = "bold" if row.ranks == plan.recommended_ranks else None
        table.add_row(str(row.ranks), *bytes_of, *times, f"{row.efficiency:.0%}", style=style)
    return table


def _stages(plan: TrainingPlan) -> Table:
    names = list(plan.rows[0].cost.stages)
    table = _table("Stages of a step, each by itself", "ranks", *names)
    for row in plan.rows:
        table.add_row(str(row.ranks), *(duration(row.cost.stages[name].seconds) for name in names))
    return table


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_style="bold")
    for column in columns:
        table.add_column(column, justify="right")
    return table
