"""Nodes and ranks of a Slurm job, from what Slurm says about it."""

import pytest

from trainer.errors import ConfigError
from trainer.slurm.allocation import Allocation, find_allocation, ranks_of_nodes


def expand(names: str) -> list[str]:
    return names.split("+")


def test_a_job_has_nodes_and_ranks() -> None:
    job = find_allocation({"SLURM_JOB_NODELIST": "a+b+c", "SLURM_TASKS_PER_NODE": "2(x2),1"}, expand)
    assert job == Allocation(("a", "b", "c"), (2, 2, 1)) and job.size == 5


@pytest.mark.parametrize(("text", "expected"), [("1", [1]), ("2(x3)", [2, 2, 2]), ("16(x2),3,1", [16, 16, 3, 1])])
def test_the_short_form_is_taken_apart(text: str, expected: list[int]) -> None:
    assert ranks_of_nodes(text) == expected


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "this is no job of Slurm: .* sbatch"),
        ({"SLURM_TASKS_PER_NODE": "1"}, "this is no job of Slurm"),
        ({"SLURM_JOB_NODELIST": "a+b"}, "add --ntasks-per-node=N"),
        ({"SLURM_JOB_NODELIST": "a+b", "SLURM_TASKS_PER_NODE": "2(x3"}, r"2\(x3 is not of the form"),
        ({"SLURM_JOB_NODELIST": "a+b", "SLURM_TASKS_PER_NODE": "1(x3)"}, "does not fit the 2 nodes"),
    ],
)
def test_what_is_missing_is_said(variables: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        find_allocation(variables, expand)


def test_slurm_itself_lists_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"scontrol cannot list the nodes n\[1-2\].*on PATH"):
        find_allocation({"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "1(x2)"})
