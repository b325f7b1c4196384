"""Collectives: alone, and on three ranks of Horovod in one job (collectives.py)."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.comm import SoloComm, connect
from trainer.errors import DataError, RemoteRankError


def test_three_ranks() -> None:
    launcher = Path(sys.executable).with_name("horovodrun")
    script = Path(__file__).with_name("collectives.py")
    done = subprocess.run(
        [str(launcher), "-np", "3", sys.executable, str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"rank {rank} of 3 is done" in done.stdout for rank in range(3))


class TestSolo:
    def test_is_chosen_without_horovodrun(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HOROVOD_RANK", raising=False)
        monkeypatch.delenv("HOROVOD_SIZE", raising=False)
        assert isinstance(connect(), SoloComm)

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
    error = pickle.loads(pickle.dumps(RemoteRankError(3, "DataError: no samples")))
    assert (error.rank, error.text) == (3, "DataError: no samples")
    assert str(error) == "rank 3 failed: DataError: no samples"
