"""The connection to one host, by an ssh of the test's own that runs here what it should run there"""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.hosts import Link, News

pytestmark = pytest.mark.services
HOST = "me@far.invalid"
RUN_LAST = 'for last; do :; done; exec sh -c "$last"'
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


async def kept(ssh: list[str], until: Callable[[Link], bool], lease_s: float = 30) -> tuple[str | None, list[News]]:
    """Keep a connection until something is so, then close it; returns why the host was out of reach, and all news."""
    news: asyncio.Queue[News] = asyncio.Queue()
    link = Link(HOST, ssh, lease_s, news)
    keeper = asyncio.create_task(link.keep())
    end = time.monotonic() + TIMEOUT_S
    while not until(link):
        assert time.monotonic() < end and not keeper.done(), link.trouble
        await asyncio.sleep(0.02)
    trouble, told = link.trouble, [news.get_nowait() for _ in range(news.qsize())]
    keeper.cancel()
    await link.close()
    with contextlib.suppress(asyncio.CancelledError):
        await keeper
    return trouble, told


def test_a_shell_that_greets_is_no_agent(ssh: Callable[[str], list[str]]) -> None:
    hello = "export SSH_CONNECTION='10.0.0.1 5000 10.0.0.2 22'; echo Welcome; echo '[1]'"
    _, told = asyncio.run(kept(ssh(f"{hello}; {RUN_LAST}"), lambda link: not link.is_here and link.hello is not None))
    assert [each.what["is"] for each in told] == ["here"]
    assert told[0].what["ssh"] == "10.0.0.1 5000 10.0.0.2 22"


def test_why_a_host_cannot_be_reached(ssh: Callable[[str], list[str]]) -> None:
    refused = ssh("echo 'some warning' >&2; echo 'far.invalid: No route to host' >&2; exit 255")
    found = asyncio.run(kept(refused, lambda link: bool(link.trouble)))
    assert found == ("far.invalid: No route to host", [])
    silent = ssh("exec >&-; sleep 0.2; exit 7")
    found = asyncio.run(kept(silent, lambda link: bool(link.trouble)))
    assert found == ("its agent ended (7)", [])
    found = asyncio.run(kept(["/no/such/ssh"], lambda link: bool(link.trouble)))
    assert found == ("/no/such/ssh cannot be started: No such file or directory", [])


def test_an_agent_that_is_dropped_is_asyncios_to_wait_for(
    ssh: Callable[[str], list[str]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
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
        keeper = asyncio.create_task(link.keep())
        while link.hello is None:
            await asyncio.sleep(0.02)
        link.send({})
        os.waitid(os.P_PID, int(number.read_text()), os.WEXITED | os.WNOWAIT)  # and asyncio has not looked
        link.drop("")
        dropped.set()
        while not link.trouble:
            await asyncio.sleep(0.02)
        keeper.cancel()
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
    _, told = asyncio.run(kept(silent, lambda _: tries.exists() and len(tries.read_text().split()) == 2, lease_s=4))
    assert [each.what for each in told][:2] == [{"is": "here"}, {"is": "lost", "why": "it has not answered in time"}]
    first, second = map(float, tries.read_text().split())
    assert second - first > 4, "a lease"


def test_a_lost_host_comes_back(ssh: Callable[[str], list[str]], tmp_path: Path) -> None:
    once = f"[ -e {tmp_path}/once ] || {{ touch {tmp_path}/once; echo 'Connection closed' >&2; exit 255; }}"
    _, told = asyncio.run(kept(ssh(f"{once}; {RUN_LAST}"), lambda link: link.hello is not None))
    assert [each.what["is"] for each in told] == ["here"] and (tmp_path / "once").exists()
