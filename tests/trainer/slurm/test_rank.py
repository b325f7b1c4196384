"""A rank's place among the ranks: what it tells Horovod and torch is what their own launchers would."""

import pytest

from trainer.launch import By
from trainer.slurm.rank import interface_towards, variables_of

RANKS = [2, 3, 1]
"""Of three nodes."""


def slurm_of(rank: int) -> dict[str, str]:
    """What Slurm says to the rank of that number."""
    node = next(number for number in range(3) if rank < sum(RANKS[: number + 1]))
    names = {"SLURM_PROCID": rank, "SLURM_NODEID": node, "SLURM_LOCALID": rank - sum(RANKS[:node])}
    return {**{name: str(value) for name, value in names.items()}, "SLURMD_NODENAME": f"n{node}"}


def test_horovod_has_the_places_that_horovodrun_gives() -> None:
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.gloo_run import create_run_env_vars, create_slot_env_vars

    plan = get_host_assignments(parse_hosts("n0:2,n1:3,n2:1"), 6)
    for slot in plan:
        expected = {**create_slot_env_vars(slot), **create_run_env_vars("127.0.0.1", ["lo"], "4000")}
        assert variables_of(By.HOROVOD, slurm_of(slot.rank), "127.0.0.1", 4000, RANKS) == expected


@pytest.mark.parametrize(("rank", "local", "node"), [(0, 0, 0), (1, 1, 0), (4, 2, 1), (5, 0, 2)])
def test_torch_has_the_places_that_torchrun_gives(rank: int, local: int, node: int) -> None:
    found = variables_of(By.TORCH, slurm_of(rank), "127.0.0.1", 4000, RANKS)
    assert found == {
        "RANK": str(rank), "WORLD_SIZE": "6", "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(RANKS[node]),
        "GROUP_RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4000", "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }  # fmt: skip


def test_the_interface_is_the_one_on_the_way() -> None:
    assert interface_towards("127.0.0.1") == "lo"
