"""Plans: their inputs, how they are built, and how they are shown."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from featurestore.console.output import print_line, print_table
from featurestore.text import DType
from trainer.config.options import Section, validated
from trainer.errors import ConfigError
from trainer.files import read_mapping
from trainer.plan.cost import (
    DESIGNS,
    BatchCounts,
    Design,
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

FEATURE_ITEM_BYTES = {"int8": 1, "bfloat16": 2, "float16": 2, "float32": 4}
_SKEW_WORTH_A_WORD = 1.05
_DECODED_WORTH_A_WORD = 1.31
MOST_OF_MEMORY = 0.8
"""Of a machine's, for features and ID rows."""
LEAST_EFFICIENCY = 0.5
"""More ranks are recommended as long as each does at least so much of what it would do alone."""
PROGRAM_BYTES = 2 * 2**30
"""Memory of a rank besides features and ID rows: Python and torch (.6 GB), batches that are read ahead, activations."""
_TIE = 1.2  # times are right within a fifth (docs/PLAN.md)


@dataclass(frozen=True)
class StoredBytes:
    """What ranks hold: the feature store and the ID tables. `table_bytes` is of all tables, with Adam's state."""

    rows: int
    dim: int
    dtype: str
    shards: int
    table_bytes: int
    table_shards: int
    machine_memory_bytes: int | None = None
    """Of a machine, where it is known."""
    copied: bool = False
    """Whether checkpoints are written during the training, from a copy of the ID rows."""

    def feature_bytes(self, dtype: str, ranks: int) -> float:
        """Return the bytes of features on the rank that has most shards."""
        return self.rows * self.dim * FEATURE_ITEM_BYTES[dtype] * most_shards(self.shards, ranks) / self.shards

    def rank_bytes(self, ranks: int) -> float:
        """Return the bytes of features and ID rows, and of the copy of these, on the rank that has most."""
        tables = self.table_bytes * most_shards(self.table_shards, ranks) / self.table_shards
        return self.feature_bytes(self.dtype, ranks) + tables * (2 if self.copied else 1)


@dataclass(frozen=True)
class RankPlan:
    """The plan for one number of ranks. `efficiency`: samples/s over those of the base, each divided by its ranks."""

    ranks: int
    counts: BatchCounts
    costs: Mapping[Design, StepCost]
    efficiency: Mapping[Design, float]
    day_s: Mapping[Design, float]
    stored: Mapping[str, float]
    """Bytes of features that a rank holds, by dtype."""
    rank_bytes: float
    sample_day_bytes: float
    """Of the features in a day's samples, were they stored there."""

    @property
    def best(self) -> Design:
        """Choose the one that moves the fewest bytes, of designs as fast as the fastest within a plan's error."""
        fastest_s = min(cost.seconds for cost in self.costs.values())
        as_fast = [design for design in DESIGNS if self.costs[design].seconds <= _TIE * fastest_s]
        return min(as_fast, key=lambda design: sum(self.costs[design].bytes_by_part.values()))


@dataclass(frozen=True)
class TrainingPlan:
    """The rows of all numbers of ranks, what their efficiency is measured against, and all assumptions."""

    title: str
    base_ranks: int
    samples_per_day: float
    rows: tuple[RankPlan, ...]
    machines: Mapping[int, Machine]
    """By ranks on one machine."""
    advice: tuple[str, ...]
    assumptions: tuple[str, ...]
    memory_bytes: int | None = None
    """Of a machine, where it is known."""


@dataclass(frozen=True)
class Recommendation:
    """The number of ranks to take, and why; None where the ranks of no row fit into the machines' memory."""

    ranks: int | None
    reason: str


def build(
    title: str,
    counts_of: Callable[[int], BatchCounts],
    ranks: Sequence[int],
    base_ranks: int,
    widths: Widths,
    machines: Mapping[int, Machine],
    stored: StoredBytes,
    samples_per_day: float,
    assumptions: Sequence[str],
    warnings: Sequence[str] = (),
) -> TrainingPlan:
    """Make the plan for each of `ranks`; `machines` has one for every number of ranks that share a machine.

    `warnings`: lines that come before the advice.
    """

    def costs_at(count: int) -> tuple[BatchCounts, dict[Design, StepCost]]:
        machine = machines[min(count, max(machines))]
        counts = counts_of(count)
        return counts, {design: step_cost(design, counts, widths, machine) for design in DESIGNS}

    _, base = costs_at(base_ranks)
    rows = []
    for count in ranks:
        counts, costs = costs_at(count)
        rows.append(
            RankPlan(
                ranks=count,
                counts=counts,
                costs=costs,
                efficiency={d: costs[d].samples_per_s * base_ranks / (base[d].samples_per_s * count) for d in DESIGNS},
                day_s={d: samples_per_day / costs[d].samples_per_s for d in DESIGNS},
                stored={dtype: stored.feature_bytes(dtype, count) for dtype in FEATURE_ITEM_BYTES},
                rank_bytes=stored.rank_bytes(count),
                sample_day_bytes=widths.feature_bytes * counts.images.references / counts.samples * samples_per_day,
            )
        )
    advice = [*warnings]
    for row in rows:
        advice += advise(row, stored, min(row.ranks, max(machines)))
        speedup = row.efficiency[row.best] * row.ranks / base_ranks
        if row.ranks > base_ranks and speedup < 1:
            advice.append(
                f"{row.ranks} ranks are slower than {base_ranks}: they make {speedup:.2g} times its samples/s."
            )
    return TrainingPlan(
        title=title,
        base_ranks=base_ranks,
        samples_per_day=samples_per_day,
        rows=tuple(rows),
        machines=machines,
        advice=tuple(dict.fromkeys(advice)),
        assumptions=tuple(assumptions),
        memory_bytes=stored.machine_memory_bytes,
    )


def advise(row: RankPlan, stored: StoredBytes, local_ranks: int = 1) -> list[str]:
    """Say which design to choose for these ranks and why, and what to change about shards and memory."""
    who = "1 rank" if row.ranks == 1 else f"{row.ranks} ranks"
    best = row.costs[row.best]
    others = [row.costs[design] for design in DESIGNS if design != row.best]
    times = " and ".join(f"{each.seconds / best.seconds:.3g} times {each.design}'s" for each in others)
    lines = [f"{who}: {row.best}. Its samples/s are {times}."]
    if any(each.seconds < best.seconds for each in others):
        lines[0] += " These times are too near to be compared: the fewest bytes decide."
    if row.best != "exchange":
        lines[0] += " This trainer does not offer it."
    if row.best == "store in worker":
        lines.append(f"{who}: the samples of a day with their features are {row.sample_day_bytes / 1e12:.3g} TB.")
        return lines
    if (decoded := row.counts.decoded * row.ranks / row.counts.samples) > _DECODED_WORTH_A_WORD:
        lines.append(
            f"{who}: a rank decodes {decoded:.2g} times its own samples, as ranks share streams of them. Set "
            f"data.shuffle_streams to a multiple of {row.ranks}, and write ten row groups or more for each rank."
        )
    images, ids = (_uneven(keys, row.ranks) for keys in (row.counts.images, row.counts.ids))
    lines += _of_shards(who, row.ranks, images, stored.shards, "images", "make the store with --num-shards")
    lines += _of_shards(who, row.ranks, ids, stored.table_shards, "ids", "set model.table_shards to")
    needed = row.rank_bytes * local_ranks
    if stored.machine_memory_bytes is not None and needed > MOST_OF_MEMORY * stored.machine_memory_bytes:
        lines.append(
            f"{who}: a machine has to hold {needed / 1e9:,.3g} GB, and this one has "
            f"{stored.machine_memory_bytes / 1e9:,.3g} GB: what does not fit is read from its disk, which is not in "
            "the times. Take more machines, or a store of a smaller dtype (python -m featurestore recode)."
        )
    return lines


def recommend(plan: TrainingPlan) -> Recommendation:
    """Recommend the most ranks whose efficiency is half or more, of those whose memory a machine has.

    Where all are less efficient it is the fewest ranks that fit.
    """
    there = plan.memory_bytes
    fitting = [row for row in plan.rows if there is None or machine_bytes(plan, row) <= there]
    if not fitting:
        least = min(plan.rows, key=lambda row: machine_bytes(plan, row))
        return Recommendation(
            None,
            f"None of {', '.join(str(row.ranks) for row in plan.rows)} ranks fits: with {least.ranks} a machine needs "
            f"{machine_bytes(plan, least) / 1e9:,.3g} GB and this one has {(there or 0) / 1e9:,.3g} GB. Plan with more "
            "--ranks, or with a store of a smaller dtype (python -m featurestore recode).",
        )
    efficient = [row for row in fitting if row.efficiency["exchange"] >= LEAST_EFFICIENCY]
    row = max(efficient, key=lambda row: row.ranks) if efficient else min(fitting, key=lambda row: row.ranks)
    why = "the most that are" if efficient else "the fewest, as none is"
    who, efficiency = "1 rank" if row.ranks == 1 else f"{row.ranks} ranks", row.efficiency["exchange"]
    return Recommendation(
        row.ranks,
        f"{who}: {why} at least {LEAST_EFFICIENCY:.0%} efficient ({efficiency:.0%}). "
        f"A machine needs {machine_bytes(plan, row) / 1e9:,.3g} GB of memory.",
    )


def machine_bytes(plan: TrainingPlan, row: RankPlan) -> float:
    """Return the memory that a machine needs for its ranks: features, ID rows and programs; a fifth stays free."""
    local = min(row.ranks, max(plan.machines))
    return local * (row.rank_bytes + PROGRAM_BYTES) / MOST_OF_MEMORY


def _uneven(keys: KeyCounts, ranks: int) -> float:
    """Return the unique keys of the busiest owner over the mean."""
    return keys.owned * ranks / keys.unique if keys.unique else 1.0


def _of_shards(who: str, ranks: int, skew: float, shards: int, things: str, way_out: str) -> list[str]:
    """Advise on shards that do not divide evenly; where keys alone are uneven, more shards do not help."""
    uneven = most_shards(shards, ranks) * ranks / shards
    if min(skew, uneven) <= _SKEW_WORTH_A_WORD:
        return []
    return [
        f"{who}: the busiest owner has {skew - 1:.0%} more {things} than the mean. Of that {uneven - 1:.0%} are due to "
        f"{shards} shards, which do not divide evenly: {way_out} {even_shards(ranks)}."
    ]


def most_shards(num_shards: int, ranks: int) -> int:
    """Count the shards of the rank that has most."""
    return -(-num_shards // ranks)


def even_shards(ranks: int) -> int:
    """Return the smallest power of two of shards of which no rank has more than 5 % above the mean."""
    shards = 1
    while most_shards(shards, ranks) * ranks > _SKEW_WORTH_A_WORD * shards:
        shards *= 2
    return shards


PAPER = Path(__file__).parent.parent / "presets" / "plan-paper.yaml"

_OTHER_LATENCIES_US = (50.0, 100.0, 400.0)
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SPEED = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?-i:b)(?:its?|ps|it/s)?", re.IGNORECASE)  # B would be bytes


class PaperKeys(Section):
    """Keys of one kind: references and different ones in a global batch, of which no two nodes ask for the same."""

    references_per_sample: float
    unique: float
    num_shards: int
    vector_bytes: float

    def keys(self, samples: int, ranks: int) -> KeyCounts:
        """Count the keys of a global batch of `samples` samples on `ranks` nodes."""
        asked, skew = self.unique / ranks, owner_skew(self.unique, ranks, self.num_shards)
        return KeyCounts(self.references_per_sample * samples, asked, asked * skew, self.unique, asked * skew)


class PaperRun(Section):
    """A run whose time is known: the compute of a node is what is left of its step without the wire."""

    ranks: int
    hours: float
    samples: int


class PaperNetwork(Section):
    """A network between machines: the latency of a message, a speed, and what an empty collective costs."""

    speed: str
    latency_us: float
    call_ms: float


class PaperCluster(Section):
    """The paper's cluster, which was not measured; every line of `assumptions` is printed with the plan."""

    title: str
    global_batch_size: int
    ranks: list[int]
    samples_per_day: int
    images: PaperKeys
    ids: PaperKeys
    dim: int
    dtype: DType
    store_rows: int
    dense_bytes: int
    reference: PaperRun
    network: PaperNetwork
    jitter: float
    assumptions: list[str]

    def counts(self, ranks: int) -> BatchCounts:
        """Count the keys of a global batch on `ranks`."""
        size = self.global_batch_size
        images, ids = (each.keys(size, ranks) for each in (self.images, self.ids))
        return BatchCounts(size, ranks, size / ranks, images, ids)

    @property
    def widths(self) -> Widths:
        """Return the bytes of what travels."""
        return Widths(
            self.dim * FEATURE_ITEM_BYTES[self.dtype],
            int(self.images.vector_bytes),
            self.ids.vector_bytes,
            self.dense_bytes,
        )

    def machine(self) -> Machine:
        """Derive a node as fast as the reference run says: all of its time but the wire goes with its images."""
        speed = bytes_per_s(self.network.speed)
        network = NetworkSpeed(self.network.call_ms / 1e3, self.network.latency_us / 1e6, speed, speed)
        known, counts = self.reference, self.counts(self.reference.ranks)
        steps = known.samples / self.global_batch_size
        idle = Machine(_image_bound(0.0, self.jitter), network, cores=1)
        wire_s = step_cost("exchange", counts, self.widths, idle).seconds
        one = dataclasses.replace(idle, rates=_image_bound(1.0, self.jitter))
        per_image_s = (known.hours * 3600 / steps - wire_s) / (
            step_cost("exchange", counts, self.widths, one).seconds - wire_s
        )
        return dataclasses.replace(idle, rates=_image_bound(per_image_s, self.jitter))


def load_paper() -> PaperCluster:
    """Load the paper's cluster. Raises ConfigError naming the file and the field."""
    return validated(PaperCluster, read_mapping(PAPER, "--paper ", ConfigError), str(PAPER), ConfigError)


def plan_paper(described: PaperCluster) -> TrainingPlan:
    """Make the plan of what the file says; efficiency is against its smallest number of ranks."""
    machine, known, network = described.machine(), described.reference, described.network
    derived = (
        f"Compute of a node: {machine.rates.embed.unit_s * 1e6:.3g} us per unique image, which is what {known.hours} h "
        f"for {known.samples:,} samples on {known.ranks} nodes leave when the wire is taken off; it falls with the "
        "number of nodes, but for what the busiest owner has more than the mean.",
        f"Network: {network.speed} each way, {network.latency_us:g} us a message, {network.call_ms:g} ms a collective; "
        "an alltoall is P - 1 messages of each node, a ring allreduce 2 (P - 1); three alltoalls, one of them hidden "
        "behind the step before, and one allreduce a step.",
        f"Steps of a node vary by {described.jitter:.0%}, and the slowest of P nodes counts.",
    )
    stored = StoredBytes(
        rows=described.store_rows,
        dim=described.dim,
        dtype=described.dtype,
        shards=described.images.num_shards,
        table_bytes=0,
        table_shards=described.ids.num_shards,
    )
    return _built(described, stored, [*described.assumptions, *derived, *_sensitivity(described, stored)])


def bytes_per_s(speed: str) -> float:
    """Return the bytes per second of a network speed in bits, as 10Gb, 400Mbit, 1 Gbit/s. Raises ConfigError."""
    found = _SPEED.fullmatch(speed.strip().removesuffix("/s"))
    value = float(found.group(1)) * _UNITS[found.group(2).lower()] / 8 if found else 0.0
    if value <= 0:
        raise ConfigError(f"network speed {speed!r}: write bits (b, not B) per second above zero, as 10Gb or 400Mbit")
    return value


def _image_bound(per_image_s: float, jitter: float) -> StageRates:
    """Return the rates of a node of which only the time per image is known."""
    nothing = StageRate(0.0, 0.0, 0.0)
    embed = StageRate(0.0, per_image_s, 0.0)
    return StageRates(nothing, nothing, nothing, embed, nothing, nothing, jitter)


def _sensitivity(described: PaperCluster, stored: StoredBytes) -> list[str]:
    """Say what another latency, which is the least known, would make of the efficiency."""
    lines = []
    for latency_us in _OTHER_LATENCIES_US:
        network = described.network.model_copy(update={"latency_us": latency_us})
        rows = _built(described.model_copy(update={"network": network}), stored, []).rows
        figures = ", ".join(f"{row.efficiency['exchange']:.0%} on {row.ranks}" for row in rows[1:])
        lines.append(f"With {latency_us:g} us a message instead the efficiency would be {figures} nodes.")
    return lines


def _built(described: PaperCluster, stored: StoredBytes, assumptions: list[str]) -> TrainingPlan:
    return build(
        title=described.title,
        counts_of=described.counts,
        ranks=sorted(described.ranks),
        base_ranks=min(described.ranks),
        widths=described.widths,
        machines={1: described.machine()},
        stored=stored,
        samples_per_day=described.samples_per_day,
        assumptions=assumptions,
    )


def as_json(plan: TrainingPlan) -> dict[str, Any]:
    """Return everything in the plan as plain values; `ranks` maps each number of ranks to its row."""
    rows = {
        str(row.ranks): {
            "counts": dataclasses.asdict(row.counts),
            "choose": row.best,
            "stored_bytes_per_rank": dict(row.stored),
            "memory_bytes_per_rank": row.rank_bytes,
            "sample_feature_bytes_per_day": row.sample_day_bytes,
            "designs": {
                design: {
                    "step_s": cost.seconds,
                    "samples_per_s": cost.samples_per_s,
                    "day_s": row.day_s[design],
                    "efficiency": row.efficiency[design],
                    "bytes_by_part": dict(cost.bytes_by_part),
                    "bytes_sent": cost.bytes_sent,
                    "stages_s": {name: stage.seconds for name, stage in cost.stages.items()},
                }
                for design, cost in row.costs.items()
            },
        }
        for row in plan.rows
    }
    return {
        "title": plan.title,
        "base_ranks": plan.base_ranks,
        "samples_per_day": plan.samples_per_day,
        "ranks": rows,
        "recommended_ranks": recommend(plan).ranks,
        "machines": {str(local): dataclasses.asdict(machine) for local, machine in plan.machines.items()},
        "advice": list(plan.advice),
        "assumptions": list(plan.assumptions),
    }


def show(plan: TrainingPlan, console: Console) -> None:
    """Print tables of counts, memory, bytes and times, then what to choose and what was taken for granted."""
    print_line(console, plan.title, style="bold")
    for draw in (_counts, _stored, _bytes, _times, _stages):
        print_table(console, draw(plan))
    print_line(console, "Recommended", style="bold")
    print_line(console, f"- {recommend(plan).reason}")
    print_line(console, "What to choose", style="bold")
    for line in plan.advice:
        print_line(console, f"- {line}")
    print_line(console, "Taken for granted", style="bold")
    for line in plan.assumptions:
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
    table = _table("A global batch", "ranks", "samples", "images", "of a rank", "images used")
    for name in ("busiest owner", "ids", "ids of a rank"):
        table.add_column(name, justify="right")
    for row in plan.rows:
        images, ids = row.counts.images, row.counts.ids
        skew = images.owned * row.ranks / images.unique if images.unique else 1.0
        figures = (images.unique, images.asked, images.references)
        table.add_row(
            str(row.ranks),
            f"{row.counts.samples:,}",
            *(f"{value:,.0f}" for value in figures),
            f"{skew - 1:+.1%}",
            *(f"{value:,.0f}" for value in (ids.unique, ids.asked)),
        )
    return table


def _stored(plan: TrainingPlan) -> Table:
    table = _table("Features of a rank, by dtype of the store", "ranks", *plan.rows[0].stored, "with ID rows, as it is")
    for row in plan.rows:
        table.add_row(str(row.ranks), *(size(value) for value in row.stored.values()), size(row.rank_bytes))
    return table


def _bytes(plan: TrainingPlan) -> Table:
    parts = list(dict.fromkeys(part for row in plan.rows for cost in row.costs.values() for part in cost.bytes_by_part))
    table = _table("Bytes of a step, out of each rank; samples are read, not sent", "ranks", "design", *parts, "sent")
    table.columns[1].justify = "left"
    for row in plan.rows:
        for design in DESIGNS:
            cost = row.costs[design]
            cells = [size(cost.bytes_by_part[part]) if part in cost.bytes_by_part else "" for part in parts]
            table.add_row(str(row.ranks), design, *cells, size(cost.bytes_sent))
    return table


def _times(plan: TrainingPlan) -> Table:
    against = f"efficiency against its own {plan.base_ranks}"
    table = _table("Time", "ranks", "design", "step", "samples/s", f"a day of {plan.samples_per_day:,.0f}", against)
    table.columns[1].justify = "left"
    for row in plan.rows:
        for design in DESIGNS:
            cost, style = row.costs[design], "bold" if design == row.best else None
            cells = (duration(cost.seconds), f"{cost.samples_per_s:,.0f}", duration(row.day_s[design]))
            table.add_row(str(row.ranks), design, *cells, f"{row.efficiency[design]:.0%}", style=style)
    return table


def _stages(plan: TrainingPlan) -> Table:
    names = list(plan.rows[0].costs["exchange"].stages)
    table = _table("Stages of a step of the exchange, each by itself", "ranks", *names)
    for row in plan.rows:
        stages: Mapping[str, Any] = row.costs["exchange"].stages
        table.add_row(str(row.ranks), *(duration(stages[name].seconds) for name in names))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_style="bold")
    for column in columns:
        table.add_column(column, justify="right")
    return table
