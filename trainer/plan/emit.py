"""The resources of a recommended plan, as the lines of a Slurm script or as a kustomize component for Kubernetes."""

import math
from dataclasses import dataclass
from typing import Literal

import yaml

from trainer.errors import PlanError
from trainer.plan.build import MOST_OF_MEMORY, RankPlan, TrainingPlan

Scheduler = Literal["slurm", "kubernetes"]
LEAST_EFFICIENCY = 0.5
"""More ranks are recommended as long as each does at least so much of what it would do alone."""
PROGRAM_BYTES = 2 * 2**30
"""Memory of a rank besides features and ID rows: Python and torch (.6 GB), batches that are read ahead, activations."""
_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True, kw_only=True)
class ResourceRequest:
    """What a training job asks for: `nodes` machines with `ranks_per_node` ranks each. `reason`: why this many."""

    nodes: int
    ranks_per_node: int
    cores_per_rank: int
    memory_bytes: int
    """Of a node."""
    gpus_per_node: int
    reason: str

    @property
    def ranks(self) -> int:
        """Return the number of ranks of the whole job."""
        return self.nodes * self.ranks_per_node


def emit(plan: TrainingPlan, scheduler: Scheduler) -> str:
    """Write the resources that the recommended row of a plan needs, for `scheduler`. Raises PlanError: nothing fits."""
    request = recommend(plan)
    return slurm_lines(request) if scheduler == "slurm" else kubernetes_component(request)


def recommend(plan: TrainingPlan) -> ResourceRequest:
    """Choose the most ranks whose efficiency is half or more, of those whose features fit into the machines' memory.

    Where all are less efficient it is the fewest ranks that fit. Ranks fill whole machines, as many on each as the
    plan was made for. Raises PlanError where no number of ranks fits.
    """
    whole = [row for row in plan.rows if row.ranks % _local_ranks(plan, row) == 0]
    if not whole:
        raise PlanError(
            f"none of {_numbers(plan.rows)} ranks fills whole machines of {max(plan.machines)} ranks; "
            "give multiples of --ranks-per-machine"
        )
    fitting = [row for row in whole if _fits(plan, row)]
    if not fitting:
        least = min(whole, key=lambda row: memory_of_node(plan, row))
        needed, there = (f"{size / 1e9:,.3g} GB" for size in (memory_of_node(plan, least), plan.memory_bytes or 0))
        raise PlanError(
            f"none of {_numbers(whole)} ranks fits: with {least.ranks} ranks a machine needs {needed} and has {there}; "
            "plan with more --ranks, or with a smaller store (python -m featurestore recode, or reduce)"
        )
    efficient = [row for row in fitting if row.efficiency["exchange"] >= LEAST_EFFICIENCY]
    row = max(efficient, key=lambda row: row.ranks) if efficient else min(fitting, key=lambda row: row.ranks)
    why = "the most of those planned that are" if efficient else "the fewest of those planned, none of which is"
    local = _local_ranks(plan, row)
    return ResourceRequest(
        nodes=row.ranks // local,
        ranks_per_node=local,
        cores_per_rank=max(1, plan.machines[local].cores // local),
        memory_bytes=memory_of_node(plan, row),
        gpus_per_node=local if plan.device == "cuda" else 0,
        reason=f"{row.ranks} ranks: {why} at least {LEAST_EFFICIENCY:.0%} efficient ({row.efficiency['exchange']:.0%})",
    )


def memory_of_node(plan: TrainingPlan, row: RankPlan) -> int:
    """Return the bytes that a machine needs: features and ID rows of its ranks, and what their programs take.

    A fifth stays free, as in the plan's advice; rounded up to whole GiB.
    """
    local = _local_ranks(plan, row)
    return math.ceil(local * (row.rank_bytes + PROGRAM_BYTES) / MOST_OF_MEMORY / _GIB) * _GIB


def slurm_lines(request: ResourceRequest) -> str:
    """Write the head of a script for sbatch."""
    lines = [
        "#!/usr/bin/env bash",
        "# Written by python -m trainer.plan --emit slurm.",
        f"# {request.reason}.",
        f"#SBATCH --nodes={request.nodes}",
        f"#SBATCH --ntasks={request.ranks}",
        f"#SBATCH --ntasks-per-node={request.ranks_per_node}",
        f"#SBATCH --cpus-per-task={request.cores_per_rank}",
        f"#SBATCH --mem={request.memory_bytes // _MIB}M",
    ]
    if request.gpus_per_node:
        lines.append(f"#SBATCH --gres=gpu:{request.gpus_per_node}")
    return "\n".join(lines) + "\n"


def kubernetes_component(request: ResourceRequest) -> str:
    """Write a kustomize component: patches for the jobs of deploy/kubernetes/overlays/train-torchrun and train-mpi."""
    cpu, memory = request.ranks_per_node * request.cores_per_rank, f"{request.memory_bytes // _GIB}Gi"
    gpus = {"nvidia.com/gpu": str(request.gpus_per_node)} if request.gpus_per_node else {}
    resources = {"requests": {"cpu": str(cpu), "memory": memory, **gpus}, "limits": {"memory": memory, **gpus}}
    variables = {"NODES": str(request.nodes), "RANKS_PER_NODE": str(request.ranks_per_node)}
    container = {
        "name": "main",
        "env": [{"name": name, "value": value} for name, value in variables.items()],
        "resources": resources,
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "train"},
        "spec": {
            "completions": request.nodes,
            "parallelism": request.nodes,
            "template": {"spec": {"containers": [container]}},
        },
    }
    roles = "/spec/mpiReplicaSpecs"
    mpijob = [  # kustomize merges no lists of kinds that it does not know; `test` refuses another order of variables
        _operation("replace", "/spec/slotsPerWorker", request.ranks_per_node),
        _operation("replace", f"{roles}/Worker/replicas", request.nodes),
        *(
            _operation("add", f"{roles}/Worker/template/spec/containers/0/resources/{part}/{_escaped(name)}", value)
            for part, values in resources.items()
            for name, value in values.items()
        ),
        _operation("test", f"{roles}/Launcher/template/spec/containers/0/env/0/name", "RANKS"),
        _operation("replace", f"{roles}/Launcher/template/spec/containers/0/env/0/value", str(request.ranks)),
    ]
    patches = [
        {"target": {"kind": "Job", "name": "train"}, "patch": yaml.safe_dump(job, sort_keys=False)},
        {"target": {"kind": "MPIJob", "name": "train"}, "patch": yaml.safe_dump(mpijob, sort_keys=False)},
    ]
    component = {"apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component", "patches": patches}
    head = f"# Written by python -m trainer.plan --emit kubernetes.\n# {request.reason}.\n"
    return head + yaml.dump(component, Dumper=_BlockText, sort_keys=False, width=120)


def _escaped(name: str) -> str:
    """Write a name as a part of the path of a JSON patch."""
    return name.replace("~", "~0").replace("/", "~1")


class _BlockText(yaml.SafeDumper):
    """Texts of several lines as people write them."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_BlockText.add_representer(str, _block)


def _operation(kind: str, path: str, value: object) -> dict[str, object]:
    return {"op": kind, "path": path, "value": value}


def _local_ranks(plan: TrainingPlan, row: RankPlan) -> int:
    return min(row.ranks, max(plan.machines))


def _fits(plan: TrainingPlan, row: RankPlan) -> bool:
    return plan.memory_bytes is None or memory_of_node(plan, row) <= plan.memory_bytes


def _numbers(rows: tuple[RankPlan, ...] | list[RankPlan]) -> str:
    return ", ".join(str(row.ranks) for row in rows)
