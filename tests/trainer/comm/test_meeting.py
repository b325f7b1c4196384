"""Ranks that do not come, and one that goes before the first collective: the others say so in one line, in time"""

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.ranks import Forks, Job
from trainer.launch import Place, Variables, free_port, horovod_rendezvous, horovod_variables, torch_variables
from trainer.main import app

pytestmark = [pytest.mark.services, pytest.mark.timeout(200)]

IMPATIENT, PATIENT = {"PATIENCE_S": "3"}, {"PATIENCE_S": "60"}
TRAIN = ["-m", "trainer.main", "--set", "run.deadline_s=3"]
CONNECTS = Path(__file__).with_name("connects.py")


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
    with horovod_rendezvous(["localhost"], [2], "127.0.0.1") as port:
        yield [horovod_variables(Place([2], 0, local), "localhost", "127.0.0.1", port, "lo") for local in (0, 1)]


def horovod_hangs(ranks: Ranks) -> str:
    with ranks_of_horovod() as (first, second), ranks.started({**first, **IMPATIENT, "STOPS": "1"}, CONNECTS):
        return ranks.said_by({**second, **IMPATIENT}, CONNECTS, code=7)


def horovod_nobody(ranks: Ranks) -> str:
    nobody = horovod_variables(Place([2], 0, 1), "localhost", "127.0.0.1", free_port(), "lo")
    said = ranks.said_by(nobody, *TRAIN, code=1)
    return said.replace(nobody["HOROVOD_GLOO_RENDEZVOUS_PORT"], "PORT")


def torch_nobody(ranks: Ranks, local: int, address: str) -> str:
    port, start_s = free_port(), time.monotonic()
    said = ranks.said_by(torch_variables(Place([1, 1], local, 0), address, port, None), *TRAIN, code=1)
    assert time.monotonic() - start_s > 3
    return said.replace(str(port), "PORT")


def torch_waits(ranks: Ranks) -> str:
    return ranks.said_by(torch_variables(Place([2], 0, 0), "127.0.0.1", free_port(), None), *TRAIN, code=1)


WAITS: dict[str, Callable[[Ranks], str]] = {
    "horovod hangs": horovod_hangs,
    "horovod nobody": horovod_nobody,
    "torch refused": partial(torch_nobody, local=1, address="127.0.0.1"),
    "torch unknown": partial(torch_nobody, local=0, address="no-such-host.invalid"),
    "torch waits": torch_waits,
}


@pytest.fixture(scope="module")
def ranks(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(forks, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def said_after_waiting(ranks: Ranks) -> Iterator[Callable[[str], str]]:
    """What a rank of `WAITS` says at its end; all of them wait at once."""
    with ThreadPoolExecutor(len(WAITS)) as threads:
        saying = {name: threads.submit(wait, ranks) for name, wait in WAITS.items()}
        yield lambda name: saying[name].result()


def test_horovod_a_rank_that_hangs_before_they_connect_is_named(said_after_waiting: Callable[[str], str]) -> None:
    """Gloo would end this one after 30 s by SIGABRT, with a stack of C++."""
    wanted = (
        "LateRankError rank 1 has waited more than run.deadline_s=3 for the others to start; not there: rank 0. See"
    )
    assert said_after_waiting("horovod hangs").startswith(wanted)


def test_horovod_nobody_at_the_rendezvous_is_one_line(said_after_waiting: Callable[[str], str]) -> None:
    said = said_after_waiting("horovod nobody")
    assert said.startswith(
        "error: rank 1 did not reach the process that started the ranks within run.deadline_s=3, at HOROVOD_GLOO_REND"
    )
    assert "=127.0.0.1:PORT: " in said and said.endswith("Connection refused>")


@pytest.mark.parametrize(
    ("name", "rank", "address", "trouble"),
    [
        ("torch refused", 1, "127.0.0.1", "Connection refused"),
        ("torch unknown", 0, "no-such-host.invalid", " service not known"),
    ],
)
def test_torch_nobody_at_the_masters_address_is_one_line(
    name: str, rank: int, address: str, trouble: str, said_after_waiting: Callable[[str], str]
) -> None:
    """It takes the deadline of the settings: the name of a host, as its rank, may come later."""
    said = said_after_waiting(name)
    assert said.startswith(
        f"error: rank {rank} did not reach the other ranks at MASTER_ADDR:MASTER_PORT={address}:PORT within "
        "run.deadline_s=3: "
    )
    assert said.endswith(trouble)


def test_torch_ranks_that_do_not_come_are_named(said_after_waiting: Callable[[str], str]) -> None:
    said = said_after_waiting("torch waits")
    assert "has taken more than run.deadline_s=3 on rank 0; not there: rank 1. See" in said


def test_horovod_a_rank_that_dies_after_they_connected_is_one_line(ranks: Ranks) -> None:
    """Collectives cannot even begin then."""
    with (
        ranks_of_horovod() as (first, second),
        ranks.started({**first, **PATIENT}, CONNECTS),
        ranks.started({**second, **PATIENT}, CONNECTS) as (rank, log),
    ):
        codes = rank.wait(100)
    (said,) = [line for line in log.read_text().splitlines() if "LostRankError" in line]
    assert codes == [7]
    assert said.startswith("LostRankError rank 1 lost another rank in the middle of collective agree")


def test_horovod_half_an_environment_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(app, TRAIN[2:])
    (said,) = done.output.splitlines()
    assert done.exit_code == 2 and done.stdout == ""
    assert said.startswith("error: HOROVOD_RANK, HOROVOD_SIZE is set, but not HOROVOD_LOCAL_RA")
