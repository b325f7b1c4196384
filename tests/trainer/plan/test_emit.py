"""What a plan asks Slurm for, and which of its rows it recommends; tests/deploy has what it asks Kubernetes for."""

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.commands.calls import call
from tests.trainer.plan.machine import COUNTS, MACHINE, WIDTHS
from trainer.errors import PlanError
from trainer.plan.__main__ import app
from trainer.plan.build import StoredBytes, TrainingPlan, build
from trainer.plan.emit import PROGRAM_BYTES, emit, recommend

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
    request = recommend(plan_of([2, 4, 8, 16], efficiency=[0.9, 0.7, 0.5, 0.4]))
    assert (request.nodes, request.ranks_per_node, request.ranks) == (8, 1, 8)
    assert "8 ranks" in request.reason and "50%" in request.reason
    fewest = recommend(plan_of([2, 4], efficiency=[0.4, 0.2]))
    assert fewest.ranks == 2 and "none of which" in fewest.reason


def test_memory_is_that_of_all_ranks_of_a_machine() -> None:
    """20 GiB on 4 ranks are 5 GiB each; two ranks of a machine, with their programs, leave a fifth of it free."""
    request = recommend(plan_of([4], local=2))
    assert request.memory_bytes == -(-2 * (5 * GIB + PROGRAM_BYTES) // (0.8 * GIB)) * GIB == 18 * GIB
    assert (request.nodes, request.ranks_per_node, request.cores_per_rank) == (2, 2, 4)


def test_ranks_that_do_not_fit_are_passed_over() -> None:
    """Of 2, 4 and 8 ranks the first do not fit into 10 GiB; where none does, the message says how much is missing."""
    plan = plan_of([2, 4, 8], memory_bytes=10 * GIB, efficiency=[0.9, 0.9, 0.3])
    assert recommend(plan).ranks == 4
    assert recommend(plan).memory_bytes <= 10 * GIB
    with pytest.raises(
        PlanError, match=r"none of 2 ranks fits: with 2 ranks a machine needs 16\.1 GB and has 4\.29 GB"
    ):
        recommend(plan_of([2], memory_bytes=4 * GIB))


def test_ranks_fill_whole_machines() -> None:
    assert recommend(plan_of([3, 4], local=2)).ranks == 4
    with pytest.raises(PlanError, match="none of 3, 5 ranks fills whole machines of 2 ranks"):
        recommend(plan_of([3, 5], local=2))


def test_the_lines_for_sbatch() -> None:
    plan = dataclasses.replace(plan_of([4], local=2), device="cuda")
    assert emit(plan, "slurm").splitlines() == [
        "#!/usr/bin/env bash",
        "# Written by python -m trainer.plan --emit slurm.",
        "# 4 ranks: the most of those planned that are at least 50% efficient (100%).",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks=4",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --mem=18432M",
        "#SBATCH --gres=gpu:2",
    ]
    assert "gres" not in emit(plan_of([4], local=2), "slurm")


def test_command(tmp_path: Path) -> None:
    """To stdout alone, where the tables go to stderr, or into a file."""
    done = CliRunner().invoke(app, ["--paper", "--emit", "slurm"])
    assert done.exit_code == 0 and done.stdout.startswith("#!/usr/bin/env bash") and "62.9 h" in done.stderr
    file = tmp_path / "head.sh"
    called = CliRunner().invoke(app, ["--paper", "--emit", "slurm", "--emit-to", str(file)])
    assert called.exit_code == 0 and file.read_text() == done.stdout and "62.9 h" in called.stdout
    wrong = call(["trainer.plan", "--paper", "--emit-to", str(file)])
    assert wrong.code == 2 and "--emit" in wrong.err
    nowhere = call(["trainer.plan", "--paper", "--emit", "slurm", "--emit-to", str(tmp_path / "no" / "file")])
    assert nowhere.code == 1 and "cannot write --emit-to" in nowhere.err
