"""The agent of a host alone: what it starts, what it passes on, and that nothing of it is left, however it ends"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from trainer.hosts import AGENT

pytestmark = pytest.mark.services

LONG = "import time; print('here', flush=True); time.sleep(1000)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {LONG}"
GRANDCHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {LONG!r}])"


class Agent:
    """An agent, and the lines of JSON to and from it."""

    def __init__(self, lease_s: float = 60) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, str(AGENT), str(lease_s)], stdin=pipe, stdout=pipe, text=True)
        self.hello = self.answer("here")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def answer(self, kind: str) -> dict[str, Any]:
        """The next answer of that kind; others are passed over."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if (what := json.loads(line))["is"] == kind:
                return what
        raise AssertionError(f"it ended before it said {kind}")

    def ask(self, **what: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def start(self, *programs: str, folder: str = ".") -> list[psutil.Process]:
        """Start `python -c PROGRAM` as a rank each; return those that are running once each has printed a line."""
        ranks = [{"rank": rank, "environment": {"NUMBER": str(rank)}} for rank in range(len(programs))]
        for rank, program in zip(ranks, programs, strict=True):
            command = [sys.executable, "-c", program]
            self.ask(do="start", command=command, folder=folder, environment={"SHARED": "x"}, ranks=[rank])
            assert self.answer("line")["text"] == "here"
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def agent() -> Iterator[Agent]:
    agent = Agent()
    yield agent
    agent.close()


def assert_gone(processes: list[psutil.Process], within_s: float = 10) -> None:
    assert processes
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    left = [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]  # of orphans, where nobody takes them up
    assert left == []


def test_it_passes_on_what_a_rank_prints_and_how_it_ends(agent: Agent, tmp_path: Path) -> None:
    program = (
        "import os, sys; print(os.environ['NUMBER'], os.environ['SHARED'], os.getcwd()); "
        "print('bad \\udcff', file=sys.stderr); sys.exit(7)"
    )
    assert agent.hello["interfaces"]["127.0.0.1"] == "lo"
    command = [sys.executable, "-c", program]
    rank = {"rank": 5, "environment": {"NUMBER": "5"}}
    agent.ask(do="start", command=command, folder=str(tmp_path), environment={"SHARED": "x"}, ranks=[rank])
    lines = {line["stream"]: line["text"] for line in (agent.answer("line"), agent.answer("line"))}
    assert lines == {"out": f"5 x {tmp_path}", "err": "bad \\udcff"}
    assert agent.answer("end") == {"is": "end", "rank": 5, "code": 7}


def test_what_cannot_be_started_is_an_end(agent: Agent) -> None:
    rank = {"rank": 0, "environment": {}}
    agent.ask(do="start", command=["/no/such/program"], folder=".", environment={}, ranks=[rank])
    assert "error: /no/such/program cannot be started" in agent.answer("line")["text"]
    assert agent.answer("end")["code"] == 1
    agent.ask(do="start", command=["true"], folder="/no/such/folder", environment={}, ranks=[rank])
    assert "/no/such/folder" in agent.answer("line")["text"]
    assert agent.answer("end")["code"] == 127


def test_a_signal_reaches_all_ranks(agent: Agent) -> None:
    agent.ask(do="start", command=["sleep", "1000"], folder=".", environment={}, ranks=[{"rank": 0, "environment": {}}])
    agent.ask(do="signal", number=signal.SIGTERM)
    assert agent.answer("end")["code"] == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTERM])
def test_sigkill_ends_a_rank_that_is_stopped_or_deaf(agent: Agent, number: int) -> None:
    ranks = agent.start(DEAF)
    ranks[0].send_signal(number)
    agent.ask(do="signal", number=signal.SIGKILL)
    assert agent.answer("end")["code"] == -signal.SIGKILL
    assert_gone(ranks)


def test_ranks_die_with_the_agent(agent: Agent) -> None:
    ranks = agent.start(LONG)
    agent.process.kill()
    assert_gone(ranks, within_s=5)


def test_ranks_and_what_they_have_started_end_when_the_supervisor_is_gone(agent: Agent) -> None:
    ranks = agent.start(GRANDCHILD)
    assert len(ranks) == 2
    assert agent.process.stdin is not None
    agent.process.stdin.close()
    assert_gone([*ranks, psutil.Process(agent.process.pid)])


def test_a_second_generation_does_not_begin_beside_the_first(agent: Agent) -> None:
    first = agent.start(LONG)
    second = agent.start(LONG)
    assert_gone(first)
    assert len(second) == 1 and second != first


def test_without_beats_it_ends_after_its_lease() -> None:
    agent = Agent(lease_s=2)
    try:
        ranks = agent.start(LONG)
        end = time.monotonic() + 3
        while time.monotonic() < end:
            agent.ask(do="beat", sent_s=agent.answer("beat")["sent_s"])
        assert all(each.is_running() for each in ranks), "it was answered in time"
        assert_gone([*ranks, psutil.Process(agent.process.pid)], within_s=5)
    finally:
        agent.close()


def test_a_host_that_goes_down_leaves_its_ranks_the_time_for_a_checkpoint(agent: Agent) -> None:
    """Its SIGTERM goes to all processes; the agent outlives it."""
    slow = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), sys.exit(130)));" + LONG
    (rank,) = agent.start(slow)
    agent.process.send_signal(signal.SIGTERM)
    rank.send_signal(signal.SIGTERM)
    assert agent.answer("end")["code"] == 130
