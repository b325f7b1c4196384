"""Collectives alone and on three ranks of each library, which of them a process gets, and where ranks meet.

Commands on ranks: a rank's place in a Slurm job, how one ends where work fails, and pages that rank 0 writes.
"""

import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socket import AF_INET
from unittest import mock

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from typer import Exit

from featurestore.console.output import print_line, text_console
from featurestore.console.page import ReportPage, recorded
from tests.pages import ReadPage
from tests.raised import raises, told
from tests.ranks import Forks, Job, TorchRanks
from tests.trainer.comm.collectives import MEETINGS
from trainer.cli import run_on_ranks
from trainer.comm import Comm, SoloComm, connect
from trainer.comm.comm import launcher_of
from trainer.comm.distributed import (
    RankAddress,
    TorchComm,
    check_reach,
    has_gpu_for_each,
    interface_towards,
    listening_address,
    own_address,
)
from trainer.errors import ConfigError, DataError
from trainer.launch import By, Variables, free_port, meeting, slots_of_job, variables_in_job, variables_of
from trainer.problems import Problem

WORKER = Path(__file__).with_name("collectives.py")


@pytest.mark.parametrize("num_ranks", [3, TorchRanks(3)], ids=["horovod", "torch"])
def test_collectives_come_in_any_order_and_a_late_rank_is_named(num_ranks: int, forks: Forks, tmp_path: Path) -> None:
    (folder := tmp_path / "said").mkdir()
    codes, said = forks.outcome(num_ranks, tmp_path / "log.txt", WORKER, folder)
    assert codes == [7] * 3, said[-3000:]
    for rank in range(3):
        assert f"rank {rank} of 3 is done" in said
        assert f"rank {rank} met the others {MEETINGS} times" in said
    where = re.compile(r"(step\.\w+)")
    late = re.findall(rf"after (\d+) s: {told(Problem.LATE_RANKS, where=where, ranks='rank 1')}", said)
    assert sorted(name for _, name in late) == ["step.keys"] * 2 + ["step.vectors"] * 2, said
    assert all(int(seconds) < 20 for seconds, _ in late)


TWO = {"localhost": 2}
HOROVODRUN = variables_of(By.HOROVOD, TWO, "localhost", 0, "127.0.0.1", 29500)
TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"}
OTHERS = {"GLOO_SOCKET_IFNAME", "TORCHELASTIC_USE_AGENT_STORE"}


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """That of a rank that nobody started; what a test adds goes with it."""
    with mock.patch.dict(os.environ):
        for name in (TORCHRUN | OTHERS | HOROVODRUN.keys()) & os.environ.keys():
            del os.environ[name]
        yield


class TestConnect:
    @pytest.mark.parametrize("left_over", [{}, {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}])
    def test_nobody_started_several(self, left_over: dict[str, str]) -> None:
        os.environ.update(left_over)
        assert isinstance(connect(), SoloComm)

    @pytest.mark.parametrize(
        ("found", "missing"),
        [
            ({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}, re.compile("^HOROVOD_GLOO_.*_ADDR")),
            ({"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ],
    )
    def test_half_of_it_is_one_line(self, found: dict[str, str], missing: str | re.Pattern[str]) -> None:
        os.environ.update(found)
        with raises(ConfigError, Problem.HALF_A_LAUNCH, where=", ".join(found), missing=missing) as raised:
            connect()
        assert "\n" not in str(raised.value)

    def test_horovodrun_without_horovod_names_both_ways_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        os.environ.update(HOROVODRUN)
        monkeypatch.setitem(sys.modules, "horovod", None)
        monkeypatch.delitem(sys.modules, "horovod.torch", raising=False)
        with raises(ConfigError, Problem.NO_HOROVOD, reason=re.compile("^No module named 'horovod")):
            connect()


class TestLauncher:
    def test_horovodrun_where_it_is_installed(self) -> None:
        horovodrun = str(Path(sys.executable).with_name("horovodrun"))
        assert launcher_of(2) == [horovodrun, "--gloo", "-np", "2", sys.executable]

    def test_torchrun_elsewhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "horovod", None)
        words = launcher_of(2)
        assert words[2:5] == [sys.executable, "-m", "torch.distributed.run"] and words[-2:] == ["--nproc-per-node", "2"]


ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}


@pytest.mark.services
class TestMeeting:
    def test_an_interface_that_is_not_there_is_one_line(self) -> None:
        os.environ.update(ALONE, MASTER_PORT=str(free_port()), GLOO_SOCKET_IFNAME="eth99")
        with raises(ConfigError, Problem.WRONG_INTERFACE, value="eth99"):
            TorchComm()

    def test_lanes_of_one_host_listen_on_loopback_alone(self) -> None:
        os.environ.update(ALONE, MASTER_PORT=str(free_port()))

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
    def test_the_store_listens_on_loopback_where_nobody_else_can_be_meant_else_where_its_master_is(self) -> None:
        """As where trainer.supervise has all ranks on this machine, under several names."""
        one_host = {"127.0.0.2": "127.0.0.2", "node-1": "127.0.0.1"}
        here = [each.address for found in psutil.net_if_addrs().values() for each in found if each.family == AF_INET]
        assert "127.0.0.1" in here
        several = {each: each for each in here} | {"localhost": "127.0.0.1", "10.0.0.1": "", "node-1": ""}
        for is_one_host, expected in ((True, one_host), (False, several)):
            assert {each: listening_address(each, is_one_host=is_one_host) for each in expected} == expected

    def test_is_that_of_the_way_to_the_others(self) -> None:
        assert own_address("127.0.0.1", is_one_host=False) == "127.0.0.1"
        assert own_address("no-such-host.invalid", is_one_host=True) == "127.0.0.1"
        with raises(ConfigError, Problem.NO_ROUTE, value="no-such-host.invalid"):
            own_address("no-such-host.invalid", is_one_host=False)

    def test_loopback_among_several_hosts_is_refused(self) -> None:
        check_reach([RankAddress("a", "127.0.0.1", 0), RankAddress("a", "127.0.0.1", 0)])
        check_reach([RankAddress("a", "10.0.0.1", 0), RankAddress("b", None, 0)])
        place = {"rank": 1, "where": "b", "address": "127.0.1.1", "other": "a"}
        with raises(ConfigError, Problem.LISTENS_ON_LOOPBACK, **place):
            check_reach([RankAddress("a", "10.0.0.1", 0), RankAddress("b", "127.0.1.1", 0)])


def test_nccl_wants_a_gpu_for_each_rank_of_a_host() -> None:
    a, b = RankAddress("a", None, 2), RankAddress("b", None, 1)
    assert has_gpu_for_each([a, a, b])
    assert not has_gpu_for_each([a, b, b])
    assert not has_gpu_for_each([RankAddress("a", None, 0)])


TRAIN = ["-m", "trainer.main", "--set", "run.deadline_s=3"]


@dataclass(frozen=True)
class Ranks:
    """Single ranks, forked: what they find in their environment counts here."""

    forks: Forks
    folder: Path

    def started(self, variables: Mapping[str, str], *arguments: object, log: str = "others") -> closing[Job]:
        """Start `python ARGUMENTS` as a rank with these variables, and kill it at the end of a block."""
        return closing(self.forks.start_with([variables], self.folder / log, *arguments))

    def said_by(self, variables: Variables, *arguments: object, code: int) -> str:
        """Run one rank to its end; return what it says, which is one line beside those of Horovod."""
        log = f"{uuid.uuid4()}.txt"
        with self.started(variables, *arguments, log=log) as rank:
            codes, said = rank.wait(100), (self.folder / log).read_text()
        assert codes == [code], said
        (line,) = [each for each in said.splitlines() if not each.startswith("[")]
        return line


@pytest.mark.services
def test_a_stopped_rank_that_holds_the_store_is_named(ranks: Ranks) -> None:
    """As trainer.supervise starts ranks: what they say at the store cannot be heard then."""
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    with ranks.started({**place, "RANK": "0"}, WORKER, "stops"):
        said = ranks.said_by({**place, "RANK": "1"}, WORKER, "stops", code=7)
    assert re.search(told(Problem.LATE_RANKS, ranks="rank 0") + ".*the store at MASTER_ADDR:MASTER_PORT", said), said


def connects(patience: Variables, stops: Variables, ranks: Ranks) -> str:
    """What the second of two ranks of this machine says, which find Horovod's rendezvous.

    The first one stops before they have connected, or dies after it: collectives cannot even begin then.
    """
    with meeting(By.HOROVOD, TWO, "127.0.0.1") as port:
        first, second = (variables_of(By.HOROVOD, TWO, "localhost", at, "127.0.0.1", port) for at in (0, 1))
        with ranks.started({**first, **patience, **stops}, WORKER, "connects"):
            return ranks.said_by({**second, **patience}, WORKER, "connects", code=7)


def waits(by: By, hosts: dict[str, int], host: str, local: int, address: str, ranks: Ranks) -> str:
    """What one of two ranks says to whom the other one does not come, within its deadline."""
    port, start_s = free_port(), time.monotonic()
    said = ranks.said_by(variables_of(by, hosts, host, local, address, port), *TRAIN, code=1)
    assert by is By.HOROVOD or time.monotonic() - start_s > 3
    return said.replace(str(port), "PORT")


NOBODY = partial(told, Problem.NO_ANSWER_OF_RANKS, limit=3)
A_AND_B = {"a": 1, "b": 1}
WAITS: dict[str, tuple[Callable[[Ranks], str], str]] = {
    # Gloo would end this one after 30 s by SIGABRT, with a stack of C++.
    "horovod hangs": (
        partial(connects, {"PATIENCE_S": "3"}, {"STOPS": "1"}),
        "LateRankError " + told(Problem.LATE_RANKS, limit=3, rank=1, ranks="rank 0"),
    ),
    "horovod dies": (
        partial(connects, {"PATIENCE_S": "60"}, {}),
        "LostRankError " + told(Problem.LOST_RANK, rank=1, where="agree"),
    ),
    "horovod nobody": (
        partial(waits, By.HOROVOD, TWO, "localhost", 1, "127.0.0.1"),
        "error: "
        + told(Problem.NO_ANSWER_OF_LAUNCHER, rank=1, limit=3, where=re.compile("HOROVOD_GLOO_REND.*=127.0.0.1:PORT"))
        + ".*Connection refused>$",
    ),
    # The deadline of the settings: the name of a host, as its rank, may come later.
    "torch refused": (
        partial(waits, By.TORCH, A_AND_B, "b", 0, "127.0.0.1"),
        f"error: {NOBODY(rank=1, where='127.0.0.1:PORT')}.*Connection refused$",
    ),
    "torch unknown": (
        partial(waits, By.TORCH, A_AND_B, "a", 0, "no-such-host.invalid"),
        f"error: {NOBODY(rank=0, where='no-such-host.invalid:PORT')}.* service not known$",
    ),
    "torch waits": (
        partial(waits, By.TORCH, TWO, "localhost", 0, "127.0.0.1"),
        ".*" + told(Problem.LATE_RANKS, limit=3, rank=0, ranks="rank 1", hint="") + "$",
    ),
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


NODES, JOB = [2, 3, 1], {"SLURM_JOB_ID": "7"}
"""Ranks of three nodes, and a job."""


def slurm_of(rank: int) -> dict[str, str]:
    """What Slurm says to the rank of that number."""
    node = next(number for number in range(3) if rank < sum(NODES[: number + 1]))
    names = {"SLURM_PROCID": rank, "SLURM_NODEID": node, "SLURM_LOCALID": rank - sum(NODES[:node]), "SLURM_JOB_ID": 7}
    job = {"SLURM_TASKS_PER_NODE": "2,3,1", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
    return {**{name: str(value) for name, value in names.items()}, **job}


@pytest.mark.parametrize(("text", "expected"), [("1", [1]), ("2(x3)", [2, 2, 2]), ("16(x2),3,1", [16, 16, 3, 1])])
def test_the_short_form_is_taken_apart(text: str, expected: list[int]) -> None:
    assert [*slots_of_job({**JOB, "SLURM_TASKS_PER_NODE": text}).values()] == expected


@pytest.mark.parametrize(("job", "tasks"), [({}, None), ({}, "1"), (JOB, None), (JOB, "2(x3")])
def test_what_is_missing_is_said(job: dict[str, str], tasks: str | None) -> None:
    with raises(ConfigError, Problem.JOB_WITHOUT_RANKS if job else Problem.NOT_A_SLURM_JOB):
        slots_of_job(job | ({"SLURM_TASKS_PER_NODE": tasks} if tasks else {}))


def test_horovod_has_the_places_that_horovodrun_gives() -> None:
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.gloo_run import create_run_env_vars, create_slot_env_vars

    plan = get_host_assignments(parse_hosts("0:2,1:3,2:1"), 6)
    for slot in plan:
        expected = {**create_slot_env_vars(slot), **create_run_env_vars("127.0.0.1", ["lo"], "4000")}
        for interface in ("HOROVOD_GLOO_IFACE", "NCCL_SOCKET_IFNAME"):  # the rank names it
            del expected[interface]
        assert variables_in_job(By.HOROVOD, slurm_of(slot.rank), 4000) == expected


@pytest.mark.parametrize(("rank", "local", "node"), [(0, 0, 0), (1, 1, 0), (4, 2, 1), (5, 0, 2)])
def test_torch_has_the_places_that_torchrun_gives(rank: int, local: int, node: int) -> None:
    assert variables_in_job(By.TORCH, slurm_of(rank), 4000) == {
        "RANK": str(rank), "WORLD_SIZE": "6", "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(NODES[node]),
        "GROUP_RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4000",
    }  # fmt: skip
    assert interface_towards("127.0.0.1") == "lo"


def one_of_two(rank: int) -> Comm:
    """What a rank of two says of itself; the other one is not there."""
    comm = SoloComm()
    comm.rank, comm.on_rank_0 = rank, lambda work: work() if rank == 0 else None  # type: ignore[method-assign]
    return comm


@pytest.mark.parametrize("rank", [0, 1])
def test_the_page_is_written_by_rank_0(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.comm.connect", lambda *_: one_of_two(rank))
    with recorded(ReportPage(tmp_path / "page.html", "T", [])):
        assert run_on_ranks(lambda comm: print_line(text_console(), f"rank {comm.rank}")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"][rank:]
    if rank == 0:
        assert "rank 0" in ReadPage((tmp_path / "page.html").read_text()).texts


def test_a_wrong_place_ends_the_command_before_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank on another machine does not look for the folder."""
    page, done = ReportPage(tmp_path / "missing" / "page.html", "T", []), list[int]()
    monkeypatch.setattr("trainer.comm.connect", lambda *_: one_of_two(1))
    with recorded(page):
        assert run_on_ranks(lambda comm: done.append(comm.rank)) == 0
    monkeypatch.setattr("trainer.comm.connect", lambda *_: one_of_two(0))
    with pytest.raises(Exit), recorded(page):
        raise Exit(run_on_ranks(lambda comm: done.append(comm.rank)))
    assert done == [1] and capsys.readouterr().err.startswith("error: cannot write --html")


def test_the_report_of_torchrun_ends_with_the_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, file = "train/a.parquet, row group 0 is damaged; write the file again", str(tmp_path / "error.json")

    def fails(_: Comm) -> None:
        raise DataError(text)

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", file)
    assert run_on_ranks(fails) == 1
    assert capsys.readouterr().err == f"error: {text}\n"
    failure = ProcessFailure(local_rank=0, pid=7, exitcode=1, error_file=file)
    *_, last, end = str(ChildFailedError("crossmedia", {0: failure})).splitlines()
    assert last.endswith(f"traceback : error: {text}")
    assert set(end) == {"="}
