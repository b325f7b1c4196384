"""The agent of a host, what it starts and leaves, and the connection to it, by an ssh of the test's own."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from trainer.launch import AGENT, Link, News

pytestmark = [pytest.mark.services, pytest.mark.cluster]

LONG = "import time; print('here', flush=True); time.sleep(1000)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {LONG}"
GRANDCHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {LONG!r}])"


class Agent:
    """An agent, and the lines of JSON to and from it."""

    def __init__(self, lease_s: float = 60) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, str(AGENT), str(lease_s)], stdin=pipe, stdout=pipe, text=True)
        self.answer("here")

    def close(self) -> None:
        with self.process:
            self.process.kill()

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

    def begin(self, *command: str, folder: object = ".") -> None:
        """Let it start a command as rank 5."""
        rank = {"rank": 5, "environment": {"NUMBER": "5"}}
        self.ask(do="start", command=command, folder=str(folder), environment={"SHARED": "x"}, ranks=[rank])

    def start(self, program: str) -> list[psutil.Process]:
        """Start `python -c PROGRAM` as a rank; return what is running once it has printed a line."""
        self.begin(sys.executable, "-c", program)
        assert self.answer("line")["text"] == "here"
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def agent() -> Iterator[Agent]:
    with closing(Agent()) as agent:
        yield agent


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
    agent.begin(sys.executable, "-c", program, folder=tmp_path)
    lines = {line["stream"]: line["text"] for line in (agent.answer("line"), agent.answer("line"))}
    assert lines == {"out": f"5 x {tmp_path}", "err": "bad \\udcff"}
    assert agent.answer("end") == {"is": "end", "rank": 5, "code": 7}


def test_what_cannot_be_started_is_an_end(agent: Agent) -> None:
    agent.begin("/no/such/program")
    assert "error: /no/such/program cannot be started" in agent.answer("line")["text"]
    assert agent.answer("end")["code"] == 1
    agent.begin("true", folder="/no/such/folder")
    assert "/no/such/folder" in agent.answer("line")["text"]
    assert agent.answer("end")["code"] == 127


def test_a_signal_reaches_all_ranks(agent: Agent) -> None:
    agent.begin("sleep", "1000")
    agent.ask(do="signal", number=signal.SIGTERM)
    assert agent.answer("end")["code"] == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTERM])
def test_sigkill_ends_a_rank_that_is_stopped_or_deaf(agent: Agent, number: int) -> None:
    ranks = agent.start(DEAF)
    ranks[0].send_signal(number)
    agent.ask(do="signal", number=signal.SIGKILL)
    assert agent.answer("end")["code"] == -signal.SIGKILL
    assert_gone(ranks)


def test_ranks_and_what_they_have_started_end_when_the_supervisor_is_gone(agent: Agent) -> None:
    ranks = agent.start(GRANDCHILD)
    assert len(ranks) == 2
    assert agent.process.stdin is not None
    agent.process.stdin.close()
    assert_gone([*ranks, psutil.Process(agent.process.pid)])


def test_a_second_generation_does_not_begin_beside_the_first_and_dies_with_the_agent(agent: Agent) -> None:
    first = agent.start(LONG)
    second = agent.start(LONG)
    assert_gone(first)
    assert len(second) == 1 and second != first
    agent.process.kill()
    assert_gone(second, within_s=5)


def test_without_beats_it_ends_after_its_lease() -> None:
    with closing(Agent(lease_s=2)) as agent:
        ranks = agent.start(LONG)
        end = time.monotonic() + 3
        while time.monotonic() < end:
            agent.ask(do="beat", sent_s=agent.answer("beat")["sent_s"])
        assert all(each.is_running() for each in ranks), "it was answered in time"
        assert_gone([*ranks, psutil.Process(agent.process.pid)], within_s=5)


def test_a_host_that_goes_down_leaves_its_ranks_the_time_for_a_checkpoint(agent: Agent) -> None:
    """Its SIGTERM goes to all processes; the agent outlives it."""
    slow = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), sys.exit(130)));" + LONG
    (rank,) = agent.start(slow)
    agent.process.send_signal(signal.SIGTERM)
    rank.send_signal(signal.SIGTERM)
    assert agent.answer("end")["code"] == 130


HOST = "me@far.invalid"
TIMEOUT_S = 30


@pytest.fixture
def ssh(tmp_path: Path) -> Callable[[str], list[str]]:
    """Makes a program of a shell's lines, in the place of ssh."""

    def make(lines: str) -> list[str]:
        program = tmp_path / "ssh"
        program.write_text(f"#!/bin/sh\n{lines}\n")
        program.chmod(0o755)
        return [str(program)]

    return make


def kept(ssh: list[str], until: Callable[[Link], bool], lease_s: float = 30) -> tuple[str | None, list[News]]:
    """Keep a connection until something is so, then close it; returns why the host was out of reach, and all news."""

    async def keep() -> tuple[str | None, list[News]]:
        news: asyncio.Queue[News] = asyncio.Queue()
        link = Link(HOST, ssh, lease_s, news)
        end = time.monotonic() + TIMEOUT_S
        while not until(link):
            assert time.monotonic() < end and not link.keeper.done(), link.trouble
            await asyncio.sleep(0.02)
        trouble, told = link.trouble, [news.get_nowait() for _ in range(news.qsize())]
        await link.close()
        return trouble, told

    return asyncio.run(keep())


def test_a_lost_host_comes_back_and_a_shell_that_greets_is_no_agent(
    ssh: Callable[[str], list[str]], tmp_path: Path
) -> None:
    once = f"[ -e {tmp_path}/once ] || {{ touch {tmp_path}/once; echo 'Connection closed' >&2; exit 255; }}"
    hello = "export SSH_CONNECTION='10.0.0.1 5000 10.0.0.2 22'; echo Welcome; echo '[1]'"
    greets = ssh(f'{once}; {hello}; for last; do :; done; exec sh -c "$last"')
    _, told = kept(greets, lambda link: not link.is_here and link.hello is not None)
    assert [each.what["is"] for each in told] == ["here"] and (tmp_path / "once").exists()
    assert told[0].what["ssh"] == "10.0.0.1 5000 10.0.0.2 22"


def test_why_a_host_cannot_be_reached(ssh: Callable[[str], list[str]]) -> None:
    def in_trouble(link: Link) -> bool:
        return bool(link.trouble)

    refused = ssh("echo 'some warning' >&2; echo 'far.invalid: No route to host' >&2; exit 255")
    assert kept(refused, in_trouble) == ("far.invalid: No route to host", [])
    assert kept(ssh("exec >&-; sleep 0.2; exit 7"), in_trouble) == ("its agent ended (7)", [])
    missing = "/no/such/ssh cannot be started: No such file or directory"
    assert kept(["/no/such/ssh"], in_trouble) == (missing, [])


def test_an_agent_that_is_dropped_is_asyncios_to_wait_for(
    ssh: Callable[[str], list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else asyncio logs `Unknown child process pid`, and says exit code 255 of what ended otherwise."""
    wait, dropped, number = os.waitpid, threading.Event(), tmp_path / "number"

    def wait_later(process: int, options: int) -> tuple[int, int]:
        assert dropped.wait(60)
        return wait(process, options)

    monkeypatch.setattr(os, "waitpid", wait_later)  # of asyncio's thread; subprocess has its own name for it

    async def drop_what_has_ended() -> str:
        says = f"""echo $$ > {number}; echo '{{"is": "here"}}'; read -r line; exit 7"""
        link = Link(HOST, ssh(says), 30, asyncio.Queue())
        while link.hello is None:
            await asyncio.sleep(0.02)
        link.send({})
        os.waitid(os.P_PID, int(number.read_text()), os.WEXITED | os.WNOWAIT)  # and asyncio has not looked
        link.drop("")
        dropped.set()
        while not link.trouble:
            await asyncio.sleep(0.02)
        link.keeper.cancel()
        return link.trouble

    assert asyncio.run(drop_what_has_ended()) == "its agent ended (7)"
    assert caplog.messages == []


def test_a_host_that_says_nothing_any_more_is_lost_and_its_ranks_outlive_their_lease_nowhere(
    ssh: Callable[[str], list[str]], tmp_path: Path
) -> None:
    """It is not asked again before its lease is over."""
    tries = tmp_path / "tries"
    says = """echo '{"is": "here"}'; echo '{"is": "beat", "sent_s": 0}'"""
    silent = ssh(f"date +%s.%N >> {tries}; {says}; exec sleep 100")
    _, told = kept(silent, lambda _: tries.exists() and len(tries.read_text().split()) == 2, lease_s=4)
    assert [each.what for each in told][:2] == [{"is": "here"}, {"is": "lost", "why": "it has not answered in time"}]
    first, second = map(float, tries.read_text().split())
    assert second - first > 4, "a lease"
