"""Collectives: alone, and on three ranks of each launcher (collectives.py)."""

import pickle
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests.ranks import TorchRanks, run_ranks
from tests.trainer.comm.collectives import MEETINGS
from trainer.comm import SoloComm
from trainer.errors import DataError, RemoteRankError


@pytest.fixture(scope="module", params=[3, TorchRanks(3)], ids=str)
def three_ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> subprocess.CompletedProcess[str]:
    """What collectives.py did on three ranks of horovodrun, or of torchrun."""
    folder = tmp_path_factory.mktemp("said")
    return run_ranks(request.param, Path(__file__).with_name("collectives.py"), folder)


@pytest.mark.services
class TestThreeRanks:
    def test_each_collective_gives_what_it_says(self, three_ranks: subprocess.CompletedProcess[str]) -> None:
        for rank in range(3):
            assert f"rank {rank} of 3 is done" in three_ranks.stdout, three_ranks.stderr[-3000:]

    def test_ranks_may_come_to_collectives_in_any_order(self, three_ranks: subprocess.CompletedProcess[str]) -> None:
        for rank in range(3):
            assert f"rank {rank} met the others {MEETINGS} times" in three_ranks.stdout, three_ranks.stderr[-3000:]

    def test_a_rank_that_does_not_come_is_named(self, three_ranks: subprocess.CompletedProcess[str]) -> None:
        assert three_ranks.returncode != 0
        said = re.findall(
            r"after (\d+) s: collective (step\.\w+) has taken more than .* not there: (rank .*?)\. See",
            three_ranks.stdout,
        )
        names = sorted(name for _, name, _ in said)
        assert names == ["step.keys"] * 2 + ["step.vectors"] * 2, three_ranks.stdout + three_ranks.stderr
        assert {late for _, _, late in said} == {"rank 1"}
        assert all(int(seconds) < 20 for seconds, _, _ in said)


class TestSolo:
    def test_returns_what_it_was_given(self) -> None:
        comm, rows, splits = SoloComm(), torch.ones(2, 3), torch.tensor([2], dtype=torch.int32)
        assert comm.alltoall(rows, splits, name="a") == (rows, splits)
        assert comm.allreduce_sum_(rows, name="a") is rows
        assert comm.allgather_object("x") == ["x"]
        assert comm.broadcast_object("x") == "x"
        assert comm.traffic == {}

    def test_agree_raises_its_own_error(self) -> None:
        SoloComm().agree(None)
        with pytest.raises(DataError, match="no samples"):
            SoloComm().agree(DataError("no samples"))


def test_remote_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(RemoteRankError(3, "DataError", "no samples")))
    assert (error.rank, error.kind, error.text) == (3, "DataError", "no samples")
    assert str(error) == "rank 3 failed: DataError: no samples"
