"""Collectives: alone, and on three ranks of Horovod and of torch (collectives.py)."""

import pickle
import re
from pathlib import Path

import pytest
import torch

from tests.ranks import Forks, TorchRanks
from tests.trainer.comm.collectives import MEETINGS
from trainer.comm import SoloComm
from trainer.errors import DataError, RemoteRankError


@pytest.fixture(scope="module", params=["horovod", "torch"])
def said(request: pytest.FixtureRequest, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What collectives.py says on three ranks of each; all of them end with code 7."""
    folder, num_ranks = tmp_path_factory.mktemp("said"), 3 if request.param == "horovod" else TorchRanks(3)
    log = tmp_path_factory.mktemp("log") / "log.txt"
    codes, said = forks.outcome(num_ranks, log, Path(__file__).with_name("collectives.py"), folder)
    assert codes == [7] * 3, said[-3000:]
    return said


class TestThreeRanks:
    def test_each_collective_gives_what_it_says(self, said: str) -> None:
        for rank in range(3):
            assert f"rank {rank} of 3 is done" in said

    def test_ranks_may_come_to_collectives_in_any_order(self, said: str) -> None:
        for rank in range(3):
            assert f"rank {rank} met the others {MEETINGS} times" in said

    def test_a_rank_that_does_not_come_is_named(self, said: str) -> None:
        told = re.findall(
            r"after (\d+) s: collective (step\.\w+) has taken more than .* not there: (rank .*?)\. See", said
        )
        names = sorted(name for _, name, _ in told)
        assert names == ["step.keys"] * 2 + ["step.vectors"] * 2, said
        assert {late for _, _, late in told} == {"rank 1"}
        assert all(int(seconds) < 20 for seconds, _, _ in told)


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
