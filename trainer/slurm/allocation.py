"""What Slurm says about a job: its nodes, and how many ranks each of them gets."""

import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trainer.errors import ConfigError

_REPEATED = re.compile(r"(\d+)(?:\(x(\d+)\))?")
HOW = "submit a script with sbatch (deploy/slurm/train.sbatch is one), or try it out under salloc"


@dataclass(frozen=True)
class Allocation:
    """The nodes of a job, and the ranks of each, in the order of ranks."""

    nodes: tuple[str, ...]
    ranks: tuple[int, ...]

    @property
    def size(self) -> int:
        """Return the number of all ranks."""
        return sum(self.ranks)


def find_allocation(environment: Mapping[str, str], expand: Callable[[str], list[str]] | None = None) -> Allocation:
    """Read a job's nodes and tasks from the variables that Slurm sets; `expand` lists the nodes of "n[1-3]".

    Raises ConfigError outside a job, and where the job does not say how many tasks a node has.
    """
    names, tasks = environment.get("SLURM_JOB_NODELIST"), environment.get("SLURM_TASKS_PER_NODE")
    if names is None:
        raise ConfigError(f"this is no job of Slurm: SLURM_JOB_NODELIST is not set; {HOW}")
    if tasks is None:
        raise ConfigError("the job does not say how many ranks a node has; add --ntasks-per-node=N to sbatch")
    nodes, ranks = (expand or list_nodes)(names), ranks_of_nodes(tasks)
    if len(nodes) != len(ranks):
        raise ConfigError(f"SLURM_TASKS_PER_NODE={tasks} does not fit the {len(nodes)} nodes {names} of the job")
    return Allocation(tuple(nodes), tuple(ranks))


def ranks_of_nodes(text: str) -> list[int]:
    """Take Slurm's short form apart: 2(x3),1 is 2, 2, 2, 1. Raises ConfigError."""
    counts: list[int] = []
    for part in text.split(","):
        match = _REPEATED.fullmatch(part)
        if match is None:
            raise ConfigError(f"SLURM_TASKS_PER_NODE={text} is not of the form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def list_nodes(names: str) -> list[str]:
    """Return the nodes of a list such as n[1-3], as Slurm itself takes it apart. Raises ConfigError."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", names], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"scontrol cannot list the nodes {names}: {error}; are Slurm's commands on PATH?") from error
    return done.stdout.split()
