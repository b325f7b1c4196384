"""Which number of ranks a plan recommends."""

import dataclasses

from tests.trainer.plan.machine import COUNTS, MACHINE, NETWORK, WIDTHS
from trainer.plan.cost import PROGRAM_BYTES, RankPlan, StoredBytes, build, recommend

GIB = 2**30


def rows_of(ranks: list[int], efficiency: list[float] | None = None, local: int = 1) -> list[RankPlan]:
    """Rows for 16 GiB of features and 4 GiB of ID rows, on machines of 8 cores with `local` ranks each."""
    network = dataclasses.replace(NETWORK, ranks_per_machine=local)
    plan = build(
        title="drawn",
        counts_of=lambda count: dataclasses.replace(COUNTS, ranks=count),
        ranks=ranks,
        widths=WIDTHS,
        machine_of=lambda _: dataclasses.replace(MACHINE, network=network),
        stored=StoredBytes(
            feature_bytes=16 * GIB, shards=64, table_bytes=4 * GIB, table_shards=64, machine_memory_bytes=1
        ),
        samples=1_000_000,
    )
    values = efficiency or [1.0] * len(ranks)
    return [dataclasses.replace(row, efficiency=value) for row, value in zip(plan.rows, values, strict=True)]


def test_the_most_ranks_that_are_half_efficient() -> None:
    ranks, reason = recommend(rows_of([2, 4, 8, 16], efficiency=[0.9, 0.7, 0.5, 0.4]), 1 << 40)
    assert ranks == 8 and reason.startswith("Take 8 ranks: the most that are at least 50% efficient (50%).")
    ranks, reason = recommend(rows_of([2, 4], efficiency=[0.4, 0.2]), 1 << 40)
    assert ranks == 2 and "as none is at least 50% efficient" in reason


def test_memory_is_that_of_all_ranks_of_a_machine() -> None:
    """20 GiB on 4 ranks are 5 GiB each; two ranks of a machine, with their programs, leave a fifth of it free."""
    rows = rows_of([4], local=2)
    assert rows[0].machine_bytes == 2 * (5 * GIB + PROGRAM_BYTES) / 0.8
    assert recommend(rows, 1 << 40)[1].endswith("A machine needs 18.8 GB of memory.")


def test_ranks_that_do_not_fit_are_passed_over() -> None:
    """Of 2, 4 and 8 ranks the first do not fit into 10 GiB; where none does, the reason says how much is missing."""
    assert recommend(rows_of([2, 4, 8], efficiency=[0.9, 0.9, 0.3]), 10 * GIB)[0] == 4
    ranks, reason = recommend(rows_of([2]), 4 * GIB)
    assert ranks is None
    assert reason.startswith("None of 2 ranks fits: with 2 a machine needs 16.1 GB and this one has 4.29 GB.")
