"""Collectives alone and on three ranks of each library, which of them a process gets, and where ranks meet."""

import pickle
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socket import AF_INET

import psutil
import pytest

from tests.ranks import Forks, Job, TorchRanks
from tests.trainer.comm.collectives import MEETINGS
from trainer.comm import SoloComm, connect
from trainer.comm.comm import launcher_of
from trainer.comm.distributed import (
    Meeting,
    RankAddress,
    TorchComm,
    check_reach,
    has_gpu_for_each,
    listening_address,
    own_address,
)
from trainer.errors import ConfigError, LostRankError, RemoteRankError
from trainer.launch import By, Variables, free_port, meeting, variables_of


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


def test_remote_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(RemoteRankError(3, "DataError", "no samples")))
    assert (error.rank, error.kind, error.text) == (3, "DataError", "no samples")
    assert str(error) == "rank 3 failed: DataError: no samples"


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
TWO = {"localhost": 2}
HOROVODRUN = variables_of(By.HOROVOD, TWO, "localhost", 0, "127.0.0.1", 29500)
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
            (
                {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"},
                "HOROVOD_RANK, HOROVOD_SIZE is .* not HOROVOD_GLOO_R.*_ADDR, ",
            ),
            ({"RANK": "0"}, "RANK is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT: "),
        ],
    )
    def test_half_of_it_is_one_line(self, monkeypatch: pytest.MonkeyPatch, found: dict[str, str], told: str) -> None:
        set_all(monkeypatch, found)
        with pytest.raises(ConfigError, match=rf"^{told}[^\n]*$"):
            connect()

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
    stopped, other = (forks.start_with([{**place, "RANK": rank}], tmp_path / rank, LONE, "stops") for rank in "01")
    try:
        codes, said = other.wait(100), (tmp_path / "1").read_text()
    finally:
        stopped.close()
        other.close()
    assert codes == [7]
    assert "not there: rank 0. See" in said and "the store at MASTER_ADDR:MASTER_PORT" in said


IMPATIENT, PATIENT = {"PATIENCE_S": "3"}, {"PATIENCE_S": "60"}
TRAIN = ["-m", "trainer.main", "--set", "run.deadline_s=3"]
LONE = Path(__file__).with_name("lone.py")


@dataclass(frozen=True)
class Ranks:
    """Single ranks, forked: what they find in their environment counts here."""

    forks: Forks
    folder: Path

    @contextmanager
    def started(self, variables: Mapping[str, str], *arguments: object) -> Iterator[tuple[Job, Path]]:
        """Start `python ARGUMENTS` as a rank with these variables, and kill it at the end."""
        log = self.folder / f"{uuid.uuid4()}.txt"
        job = self.forks.start_with([variables], log, *arguments)
        try:
            yield job, log
        finally:
            job.close()

    def said_by(self, variables: Variables, *arguments: object, code: int) -> str:
        """Run one rank to its end; return what it says, which is one line."""
        with self.started(variables, *arguments) as (rank, log):
            codes, said = rank.wait(100), log.read_text()
        assert codes == [code], said
        (line,) = said.splitlines()
        return line


@contextmanager
def ranks_of_horovod() -> Iterator[list[Variables]]:
    """The variables of two ranks of this machine, which find Horovod's rendezvous."""
    with meeting(By.HOROVOD, TWO, "127.0.0.1") as port:
        yield [variables_of(By.HOROVOD, TWO, "localhost", local, "127.0.0.1", port) for local in (0, 1)]


def horovod_hangs(ranks: Ranks) -> str:
    with ranks_of_horovod() as (first, second), ranks.started({**first, **IMPATIENT, "STOPS": "1"}, LONE, "connects"):
        return ranks.said_by({**second, **IMPATIENT}, LONE, "connects", code=7)


def horovod_nobody(ranks: Ranks) -> str:
    nobody = variables_of(By.HOROVOD, TWO, "localhost", 1, "127.0.0.1", free_port())
    said = ranks.said_by(nobody, *TRAIN, code=1)
    return said.replace(nobody["HOROVOD_GLOO_RENDEZVOUS_PORT"], "PORT")


def torch_nobody(ranks: Ranks, local: int, address: str) -> str:
    port, start_s = free_port(), time.monotonic()
    place = variables_of(By.TORCH, {"a": 1, "b": 1}, "ab"[local], 0, address, port)
    said = ranks.said_by(place, *TRAIN, code=1)
    assert time.monotonic() - start_s > 3
    return said.replace(str(port), "PORT")


def torch_waits(ranks: Ranks) -> str:
    place = variables_of(By.TORCH, TWO, "localhost", 0, "127.0.0.1", free_port())
    return ranks.said_by(place, *TRAIN, code=1)


STORE = "did not reach the other ranks at MASTER_ADDR:MASTER_PORT="
WAITS: dict[str, tuple[Callable[[Ranks], str], str]] = {
    # Gloo would end this one after 30 s by SIGABRT, with a stack of C++.
    "horovod hangs": (horovod_hangs, "LateRankError .* more than run.deadline_s=3 on rank 1; not there: rank 0. See"),
    "horovod nobody": (
        horovod_nobody,
        "error: rank 1 .* within run.deadline_s=3, at HOROVOD_GLOO_REND.*=127.0.0.1:PORT: .*Connection refused>$",
    ),
    # The deadline of the settings: the name of a host, as its rank, may come later.
    "torch refused": (
        partial(torch_nobody, local=1, address="127.0.0.1"),
        f"error: rank 1 {STORE}127.0.0.1:PORT within run.deadline_s=3: .*Connection refused$",
    ),
    "torch unknown": (
        partial(torch_nobody, local=0, address="no-such-host.invalid"),
        f"error: rank 0 {STORE}no-such-host.invalid:PORT within run.deadline_s=3: .* service not known$",
    ),
    "torch waits": (torch_waits, ".* has taken more than run.deadline_s=3 on rank 0; not there: rank 1. See"),
}


@pytest.fixture(scope="module")
def ranks(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(forks, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def said_after_waiting(ranks: Ranks) -> Iterator[Callable[[str], str]]:
    """What a rank of `WAITS` says at its end; all of them wait at once."""
    with ThreadPoolExecutor(len(WAITS)) as threads:
        saying = {name: threads.submit(wait, ranks) for name, (wait, _) in WAITS.items()}
        yield lambda name: saying[name].result()


@pytest.mark.parametrize("name", WAITS)
def test_who_is_not_there_is_named_by_one_line(name: str, said_after_waiting: Callable[[str], str]) -> None:
    assert re.match(WAITS[name][1], said := said_after_waiting(name)), said


def test_horovod_a_rank_that_dies_after_they_connected_is_one_line(ranks: Ranks) -> None:
    """Collectives cannot even begin then."""
    with (
        ranks_of_horovod() as (first, second),
        ranks.started({**first, **PATIENT}, LONE, "connects"),
        ranks.started({**second, **PATIENT}, LONE, "connects") as (rank, log),
    ):
        codes = rank.wait(100)
    (said,) = [line for line in log.read_text().splitlines() if "LostRankError" in line]
    assert codes == [7]
    assert said.startswith("LostRankError rank 1 lost another rank in the middle of collective agree")
