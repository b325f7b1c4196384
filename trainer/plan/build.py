"""A plan: for each number of ranks what a step costs in the three designs, and which one to choose."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trainer.plan.cost import DESIGNS, BatchCounts, Design, KeyCounts, Machine, StepCost, Widths, step_cost

FEATURE_ITEM_BYTES = {"int8": 1, "bfloat16": 2, "float16": 2, "float32": 4}
_SKEW_WORTH_A_WORD = 1.05
_DECODED_WORTH_A_WORD = 1.31
MOST_OF_MEMORY = 0.8
"""Of a machine's, for features and ID rows."""
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
    device: str = "cpu"
    """Where ranks compute: cpu or cuda, each rank on a GPU of its own."""


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
    device: str = "cpu",
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
        device=device,
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
