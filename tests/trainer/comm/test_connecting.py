"""Which communicator a process gets: by what its launcher left in the environment, and what is said of half of it."""

import sys
from pathlib import Path

import pytest

from trainer.comm import SoloComm, connect
from trainer.comm.comm import launcher_of
from trainer.errors import ConfigError
from trainer.launch import Place, horovod_variables

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
HOROVODRUN = horovod_variables(Place([2], 0, 0), "localhost", "127.0.0.1", 29500, None)
ALL = (*TORCHRUN, "TORCHELASTIC_RUN_ID", *HOROVODRUN)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALL:
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


class TestConnect:
    @pytest.mark.parametrize("left_over", [{}, {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}])
    def test_nobody_started_several(self, monkeypatch: pytest.MonkeyPatch, left_over: dict[str, str]) -> None:
        set_all(monkeypatch, left_over)
        assert isinstance(connect(), SoloComm)

    @pytest.mark.parametrize(
        ("found", "told"),
        [
            ({"HOROVOD_RANK": "0"}, "HOROVOD_RANK is set, but not HOROVOD_SIZE, HOROVOD_LOCAL_RANK, "),
            (
                {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"},
                "HOROVOD_RANK, HOROVOD_SIZE is set, but not HOROVOD_LOCAL_RANK, HOROVOD_LOCAL_SIZE, "
                "HOROVOD_CROSS_RANK, HOROVOD_CROSS_SIZE, HOROVOD_GLOO_RENDEZVOUS_ADDR, "
                "HOROVOD_GLOO_RENDEZVOUS_PORT: start all ranks by horovodrun or ",
            ),
            ({"RANK": "0"}, "RANK is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start all ranks by "),
            ({"TORCHELASTIC_RUN_ID": "none"}, "TORCHELASTIC_RUN_ID is set, but not RANK, WORLD_SIZE, MASTER_ADDR"),
            (
                {**TORCHRUN, "TORCHELASTIC_RUN_ID": "none", **HOROVODRUN},
                "horovodrun and torchrun both started this process",
            ),
        ],
    )
    def test_half_of_it_is_one_line(self, monkeypatch: pytest.MonkeyPatch, found: dict[str, str], told: str) -> None:
        set_all(monkeypatch, found)
        with pytest.raises(ConfigError) as error:
            connect()
        assert str(error.value).startswith(told) and "\n" not in str(error.value)

    def test_horovodrun_without_horovod_names_both_ways_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        set_all(monkeypatch, HOROVODRUN)
        monkeypatch.setitem(sys.modules, "horovod", None)
        monkeypatch.delitem(sys.modules, "horovod.torch", raising=False)
        with pytest.raises(ConfigError, match=r"cannot import Horovod .*make install builds it; .* by torchrun"):
            connect()


class TestLauncher:
    def test_horovodrun_where_it_is_installed(self) -> None:
        horovodrun = str(Path(sys.executable).with_name("horovodrun"))
        assert launcher_of(2) == [horovodrun, "--gloo", "-np", "2", sys.executable]

    def test_torchrun_elsewhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "horovod", None)
        words = launcher_of(2)
        assert words[2:5] == [sys.executable, "-m", "torch.distributed.run"] and words[-2:] == ["--nproc-per-node", "2"]
