"""Which number of ranks a plan recommends."""

import dataclasses

from tests.trainer.plan.machine import COUNTS, MACHINE, WIDTHS
from trainer.plan.build import PROGRAM_BYTES, StoredBytes, TrainingPlan, build, machine_bytes, recommend

GIB = 2**30


def plan_of(
    ranks: list[int], memory_bytes: int | None = None, efficiency: list[float] | None = None, local: int = 1
) -> TrainingPlan:
    """A plan of 16 GiB of features and 4 GiB of ID rows, on machines of 8 cores with `local` ranks each."""
    stored = StoredBytes(
        rows=2**21,
        dim=4096,
        dtype="bfloat16",
        shards=64,
        table_bytes=4 * GIB,
        table_shards=64,
        machine_memory_bytes=memory_bytes,
    )
    plan = build(
        title="drawn",
        counts_of=lambda count: dataclasses.replace(COUNTS, ranks=count),
        ranks=ranks,
        base_ranks=1,
        widths=WIDTHS,
        machines=dict.fromkeys({1, local}, MACHINE),
        stored=stored,
        samples_per_day=1e6,
        assumptions=[],
    )
    values = efficiency or [1.0] * len(ranks)
    rows = [
        dataclasses.replace(row, efficiency={**row.efficiency, "exchange": value})
        for row, value in zip(plan.rows, values, strict=True)
    ]
    return dataclasses.replace(plan, rows=tuple(rows))


def test_the_most_ranks_that_are_half_efficient() -> None:
    found = recommend(plan_of([2, 4, 8, 16], efficiency=[0.9, 0.7, 0.5, 0.4]))
    assert found.ranks == 8 and found.reason.startswith("8 ranks: the most that are at least 50% efficient (50%).")
    fewest = recommend(plan_of([2, 4], efficiency=[0.4, 0.2]))
    assert fewest.ranks == 2 and "as none is at least 50% efficient" in fewest.reason


def test_memory_is_that_of_all_ranks_of_a_machine() -> None:
    """20 GiB on 4 ranks are 5 GiB each; two ranks of a machine, with their programs, leave a fifth of it free."""
    plan = plan_of([4], local=2)
    assert machine_bytes(plan, plan.rows[0]) == 2 * (5 * GIB + PROGRAM_BYTES) / 0.8
    assert recommend(plan).reason.endswith("A machine needs 18.8 GB of memory.")


def test_ranks_that_do_not_fit_are_passed_over() -> None:
    """Of 2, 4 and 8 ranks the first do not fit into 10 GiB; where none does, the reason says how much is missing."""
    plan = plan_of([2, 4, 8], memory_bytes=10 * GIB, efficiency=[0.9, 0.9, 0.3])
    assert recommend(plan).ranks == 4
    none = recommend(plan_of([2], memory_bytes=4 * GIB))
    assert none.ranks is None
    assert none.reason.startswith("None of 2 ranks fits: with 2 a machine needs 16.1 GB and this one has 4.29 GB.")
