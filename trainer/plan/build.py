"""A plan: for each number of ranks what a step costs in the three designs, and which one to choose."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trainer.plan.cost import DESIGNS, BatchCounts, Design, Machine, StepCost, Widths, step_cost

FEATURE_ITEM_BYTES = {"int8": 1, "bfloat16": 2, "float16": 2, "float32": 4}
_SKEW_WORTH_A_WORD = 1.05


@dataclass(frozen=True)
class Stored:
    """What ranks hold: the feature store and the ID tables. `table_bytes` is of all tables, with Adam's state."""

    rows: int
    dim: int
    dtype: str
    shards: int
    table_bytes: int
    table_shards: int

    def feature_bytes(self, dtype: str, ranks: int) -> float:
        """Of the rank that has most shards."""
        return self.rows * self.dim * FEATURE_ITEM_BYTES[dtype] * most_shards(self.shards, ranks) / self.shards

    def rank_bytes(self, ranks: int) -> float:
        """Features and ID rows of the rank that has most."""
        tables = self.table_bytes * most_shards(self.table_shards, ranks) / self.table_shards
        return self.feature_bytes(self.dtype, ranks) + tables


@dataclass(frozen=True)
class Row:
    """One number of ranks. `efficiency`: samples/s over those of the base, each divided by its ranks."""

    ranks: int
    counts: BatchCounts
    costs: Mapping[Design, StepCost]
    efficiency: Mapping[Design, float]
    day_s: Mapping[Design, float]
    stored: Mapping[str, float]
    """Bytes of features that a rank holds, by dtype."""
    rank_bytes: float

    @property
    def best(self) -> Design:
        """The fastest."""
        return min(DESIGNS, key=lambda design: self.costs[design].seconds)


@dataclass(frozen=True)
class Plan:
    """All rows, the ranks that their efficiency is measured against, and everything that was taken for granted."""

    title: str
    base_ranks: int
    samples_per_day: float
    rows: tuple[Row, ...]
    machines: Mapping[int, Machine]
    """By ranks on one machine."""
    advice: tuple[str, ...]
    assumptions: tuple[str, ...]


def build(
    title: str,
    counts_of: Callable[[int], BatchCounts],
    ranks: Sequence[int],
    base_ranks: int,
    widths: Widths,
    machines: Mapping[int, Machine],
    stored: Stored,
    samples_per_day: float,
    assumptions: Sequence[str],
) -> Plan:
    """The plan for each of `ranks`; `machines` has one for every number of ranks that share a machine."""

    def costs_at(count: int) -> tuple[BatchCounts, dict[Design, StepCost]]:
        machine = machines[min(count, max(machines))]
        counts = counts_of(count)
        return counts, {design: step_cost(design, counts, widths, machine) for design in DESIGNS}

    _, base = costs_at(base_ranks)
    rows = []
    for count in ranks:
        counts, costs = costs_at(count)
        rows.append(
            Row(
                ranks=count,
                counts=counts,
                costs=costs,
                efficiency={d: costs[d].samples_per_s * base_ranks / (base[d].samples_per_s * count) for d in DESIGNS},
                day_s={d: samples_per_day / costs[d].samples_per_s for d in DESIGNS},
                stored={dtype: stored.feature_bytes(dtype, count) for dtype in FEATURE_ITEM_BYTES},
                rank_bytes=stored.rank_bytes(count),
            )
        )
    advice = tuple(line for row in rows for line in advise(row, stored))
    return Plan(
        title, base_ranks, samples_per_day, tuple(rows), machines, tuple(dict.fromkeys(advice)), tuple(assumptions)
    )


def advise(row: Row, stored: Stored) -> list[str]:
    """Which design to choose for these ranks and why, and what to change about the shards."""
    best = row.costs[row.best]
    others = [row.costs[design] for design in DESIGNS if design != row.best]
    times = " and ".join(f"{each.seconds / best.seconds:.2g} times {each.design}'s" for each in others)
    lines = [f"{row.ranks} ranks: {row.best}. Its samples/s are {times}."]
    images, skew = row.counts.images, row.counts.images.owned * row.ranks / max(1e-9, row.counts.images.unique)
    if row.best == "exchange" and skew > _SKEW_WORTH_A_WORD and images.unique > 0:
        uneven = most_shards(stored.shards, row.ranks) * row.ranks / stored.shards
        if uneven > _SKEW_WORTH_A_WORD:
            lines.append(
                f"{row.ranks} ranks: the busiest owner has {skew - 1:.0%} more images than the mean, as "
                f"{stored.shards} shards do not divide evenly; of {even_shards(row.ranks)} shards no rank has 5 % more."
            )
    return lines


def most_shards(num_shards: int, ranks: int) -> int:
    """Shards of the rank that has most."""
    return -(-num_shards // ranks)


def even_shards(ranks: int) -> int:
    """The smallest power of two of shards of which no rank has more than 5 % above the mean."""
    shards = 1
    while most_shards(shards, ranks) * ranks > _SKEW_WORTH_A_WORD * shards:
        shards *= 2
    return shards
