"""Where ranks of torch.distributed meet, and at which address each listens."""

from pathlib import Path
from socket import AF_INET

import psutil
import pytest

from tests.ranks import Forks
from trainer.comm.distributed import (
    Meeting,
    RankAddress,
    TorchComm,
    check_reach,
    has_gpu_for_each,
    listening_address,
    own_address,
)
from trainer.errors import ConfigError, LostRankError
from trainer.launch import free_port


@pytest.mark.services
class TestMeeting:
    @pytest.fixture(autouse=True)
    def _environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of one rank that something else than torchrun started."""
        for name in ("GLOO_SOCKET_IFNAME", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        for name, value in place.items():
            monkeypatch.setenv(name, value)

    def test_a_store_that_is_not_there_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(LostRankError, match="rank 1 did not reach the other ranks at MASTER_ADDR:MASTER_PORT=loc"):
            Meeting.of_environment(0.5)

    def test_an_interface_that_is_not_there_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth99")
        with pytest.raises(ConfigError, match=r"^GLOO_SOCKET_IFNAME=eth99: "):
            TorchComm()

    def test_lanes_of_one_host_listen_on_loopback_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")

        def listening() -> set[str]:
            return {each.laddr.ip for each in psutil.Process().net_connections("tcp") if each.status == "LISTEN"}

        before = listening()
        comm = TorchComm()
        comm.allgather_object("here")
        assert listening() - before <= {"127.0.0.1"}
        comm.close()
        comm.close()


class TestAddress:
    @pytest.mark.services
    def test_the_store_listens_on_loopback_where_nobody_else_can_be_meant(self) -> None:
        """As where trainer.supervise has all ranks on this machine, under several names."""
        assert listening_address("127.0.0.1", is_one_host=False) == "127.0.0.1"
        assert listening_address("127.0.0.2", is_one_host=True) == "127.0.0.2"
        assert listening_address("localhost", is_one_host=False) == "127.0.0.1"
        assert listening_address("node-1", is_one_host=True) == "127.0.0.1"
        assert listening_address("10.0.0.1", is_one_host=False) == listening_address("node-1", is_one_host=False) == ""

    @pytest.mark.services
    def test_the_store_of_several_hosts_listens_where_their_master_is(self) -> None:
        here = [each.address for found in psutil.net_if_addrs().values() for each in found if each.family == AF_INET]
        assert here and [listening_address(each, is_one_host=False) for each in here] == here

    def test_is_that_of_the_way_to_the_others(self) -> None:
        assert own_address("127.0.0.1", is_one_host=False) == "127.0.0.1"
        assert own_address("no-such-host.invalid", is_one_host=True) == "127.0.0.1"

    def test_no_way_is_one_line(self) -> None:
        with pytest.raises(ConfigError, match=r"^MASTER_ADDR=no-such-host\.invalid: no route from "):
            own_address("no-such-host.invalid", is_one_host=False)

    def test_loopback_among_several_hosts_is_refused(self) -> None:
        check_reach([RankAddress("a", "127.0.0.1", 0), RankAddress("a", "127.0.0.1", 0)])
        check_reach([RankAddress("a", "10.0.0.1", 0), RankAddress("b", None, 0)])
        with pytest.raises(ConfigError, match=r"rank 1 on b would listen at 127\.0\.1\.1, out of reach for a: .*=eth0"):
            check_reach([RankAddress("a", "10.0.0.1", 0), RankAddress("b", "127.0.1.1", 0)])


def test_nccl_wants_a_gpu_for_each_rank_of_a_host() -> None:
    a, b = RankAddress("a", None, 2), RankAddress("b", None, 1)
    assert has_gpu_for_each([a, a, b])
    assert not has_gpu_for_each([a, b, b])
    assert not has_gpu_for_each([RankAddress("a", None, 0)])


@pytest.mark.services
def test_a_stopped_rank_that_holds_the_store_is_named(forks: Forks, tmp_path: Path) -> None:
    """As trainer.supervise starts ranks: what they say at the store cannot be heard then."""
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    stops = Path(__file__).with_name("stops.py")
    stopped, other = (forks.start_with([{**place, "RANK": rank}], tmp_path / rank, stops) for rank in "01")
    try:
        codes, said = other.wait(100), (tmp_path / "1").read_text()
    finally:
        stopped.close()
        other.close()
    assert codes == [7]
    assert "not there: rank 0. See" in said and "the store at MASTER_ADDR:MASTER_PORT" in said
