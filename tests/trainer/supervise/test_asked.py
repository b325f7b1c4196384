"""What a person gives to trainer.supervise: hosts, and a command whose run can be found and gone on with"""

import asyncio
import socket
import sys
from pathlib import Path
from unittest import mock

import pytest

from featurestore.console.commandline import STOPPED
from tests.raised import raises, told
from tests.trainer.runs.saved import save
from trainer import supervise
from trainer.errors import ConfigError
from trainer.launch import AGENT, By, News, Reach, agent_command, environments, parse_hosts, reach_of_all
from trainer.problems import Problem
from trainer.supervise import Generation, Past, RankEnd, SuperviseOptions, Supervisor, parse_command, past_text

TRAIN, EVALUATE = (["python", "-m", f"trainer.{name}"] for name in ("main", "evaluate"))
TRAINING = "crossmedia train or crossmedia daily"


def test_hosts_in_every_form() -> None:
    assert parse_hosts("a:4, me@b.example:2 ,d") == {"a": 4, "me@b.example": 2, "d": 1}
    assert SuperviseOptions(command=[], max_np=3).read_hosts() == {"localhost": 3}
    with raises(ConfigError, Problem.NO_HOSTS):
        SuperviseOptions(command=[]).read_hosts()


@pytest.mark.parametrize("text", ["a:0", "a:b:1", "-oProxyCommand=x", "-x:1", "", "a:1,a:2"])
def test_hosts_that_are_none(text: str) -> None:
    problem, value = (Problem.HOST_TWICE, "a") if text == "a:1,a:2" else (Problem.NOT_A_HOST, text)
    with raises(ConfigError, problem, value=value):
        parse_hosts(text)


def test_the_agent_of_another_host_is_started_by_ssh() -> None:
    command = agent_command("me@b", ["ssh", "-p", "2222"], 20, here=False)
    assert command[:3] == ["ssh", "-p", "2222"] and command[-2] == "me@b"
    assert command[-1].startswith("exec ") and command[-1].endswith(f"{AGENT} 20")
    assert agent_command("localhost", ["ssh"], 20, here=True)[1:] == ["-P", str(AGENT), "20", "--local"]


def test_the_run_of_a_command_is_found(tmp_path: Path) -> None:
    settings = ["--set", f"run.dir={tmp_path}", "--set", "run.name=mine"]
    train = parse_command([*TRAIN, *settings])
    assert train.folder == tmp_path / "mine" and train.newest_step() == 0
    assert train.start() == [sys.executable, *TRAIN[1:], *settings, "--set", "run.resume=auto"]
    for step in (50, 100_000_000, 1250):
        save(train.folder, step)
    assert train.newest_step() == 100_000_000
    own = parse_command(["python", "-u", "own.py", *settings])
    assert own.folder == train.folder
    front = parse_command(["crossmedia", "train", *settings])
    assert front.folder == train.folder and front.start()[:4] == [sys.executable, "-m", "crossmedia", "train"]
    assert parse_command(["python", "-m", "crossmedia", "train", *settings]).start() == front.start()
    other = parse_command(["/opt/python", "own.py", *settings])
    assert other.start()[:2] == ["/opt/python", "own.py"]


def test_days_are_found_and_their_steps_counted_together(tmp_path: Path) -> None:
    words = ["python", "-m", "trainer.daily", "data.samples=s", "--first-day", "2026-01-01"]
    train = parse_command([*words, f"run.dir={tmp_path}"])
    assert train.folder == tmp_path / "daily" and train.newest_step() == 0
    assert train.start() == [sys.executable, *words[1:], f"run.dir={tmp_path}"]
    front = parse_command(["crossmedia", "daily", *words[3:], f"run.dir={tmp_path}"])
    assert front.folder == train.folder and front.is_daily
    seen = []
    for day, step in (("2026-01-01", 7), ("2026-01-02", 3), ("2026-01-02", 5), ("other", 99), ("2026-01-03", 1)):
        save(train.folder / day, step)
        seen.append(train.newest_step())
    assert seen == [7, 10, 12, 12, 13]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*TRAIN, "run.nam=a"], told(Problem.SETTING_UNKNOWN, where="run.nam")),
        ([*TRAIN, "run.dir=runs"], told(Problem.SUPERVISED_WITHOUT_NAME)),
        ([*TRAIN, "run.name=a", "run.resume=1000"], told(Problem.SUPERVISED_RESUME)),
        ([*TRAIN, "run.name=a", "run.overwrite=true"], told(Problem.SUPERVISED_RESUME)),
        (["horovodrun", "-np", "2", *TRAIN], told(Problem.LAUNCHER_SUPERVISED, value="horovodrun")),
        (["sleep", "5"], told(Problem.NOT_A_TRAINING_COMMAND, value="sleep 5", known=TRAINING)),
        (EVALUATE, told(Problem.NOT_A_TRAINING_COMMAND, value=" ".join(EVALUATE), known=TRAINING)),
    ],
)
def test_commands_that_cannot_be_supervised(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_command(words)


def test_addresses_by_which_hosts_reach_each_other() -> None:
    here = mock.Mock(host="here", is_here=True, hello={"is": "here"})
    away = mock.Mock(host="b", is_here=False, hello={"ssh": "10.0.0.1 50000 10.0.0.2 22"})
    lost = mock.Mock(host="d", is_here=False, hello=None)
    assert reach_of_all([here]) == {"here": Reach("127.0.0.1", "127.0.0.1")}
    both = {"here": Reach("10.0.0.1", "10.0.0.1"), "b": Reach("10.0.0.2", "10.0.0.1")}
    assert reach_of_all([lost, here, away]) == both


@pytest.mark.services  # the rendezvous is a server
def test_variables_of_ranks() -> None:
    hosts = {"a": 2, "b": 1}
    reach = {"a": Reach("127.0.0.1", "127.0.0.1"), "b": Reach("127.0.0.2", "127.0.0.1")}
    with environments(By.HOROVOD, hosts, reach) as ranks:
        port = int(ranks[0]["HOROVOD_GLOO_RENDEZVOUS_PORT"])
        socket.create_connection(("127.0.0.1", port)).close()
        with pytest.raises(ConnectionRefusedError):  # it listens where the hosts reach it, and nowhere else
            socket.create_connection(("127.0.0.2", port))
        assert [each["HOROVOD_LOCAL_RANK"] for each in ranks] == ["0", "1", "0"]
        assert {each["HOROVOD_GLOO_RENDEZVOUS_ADDR"] for each in ranks} == {"127.0.0.1"}
    with environments(By.TORCH, hosts, reach) as ranks:
        assert [each["LOCAL_RANK"] for each in ranks] == ["0", "1", "0"]
        assert {each["MASTER_ADDR"] for each in ranks} == {"127.0.0.1"}
    with environments(By.TORCH, {"b": 1}, reach) as ranks:
        assert ranks == [{}], "one rank alone needs no other"


def test_a_stop_is_announced_and_a_second_one_is_at_once() -> None:
    said: list[str] = []
    supervisor = Supervisor(SuperviseOptions(command=[]), {}, mock.Mock(), mock.Mock(say=said.append))
    supervisor.on_signal()
    (first,) = said
    assert "write a checkpoint, for 300 s (--stop-grace-s); a second signal ends them at once" in first
    assert supervisor.stop.is_set() and not supervisor.stops_at_once
    supervisor.on_signal()
    supervisor.on_signal()
    assert said == [first, "stopping at once"] and supervisor.stops_at_once


def test_what_hosts_have_of_their_own_is_not_sent_to_them() -> None:
    sent = {"AWS_ENDPOINT_URL": "u", "PATH": "p"}
    assert supervise.inherited({"HOME": "/root", "SSH_CONNECTION": "x", **sent}) == sent


A, B, C = {"a": 4}, {"b": 4}, {"c": 2}


def end(rank: int = 3, host: str = "b", code: int | None = -9, **more: object) -> RankEnd:
    return RankEnd(rank=rank, host=host, code=code, **more)  # type: ignore[arg-type]


def past(*ends: RankEnd, before: int = 0, after: int = 0) -> Past:
    return Past(step_before=before, step_after=after, ends=ends or (end(),))


@pytest.mark.parametrize(
    ("available", "least", "most", "placed"),
    [
        (A | B, 2, 8, [("a", 4), ("b", 4)]),
        (A | B, 2, 6, [("a", 4), ("b", 2)]),
        (A | B, 2, 4, [("a", 4)]),
        (B, 2, 8, [("b", 4)]),
        (C, 2, 8, [("c", 2)]),
        (C, 3, 8, None),
        ({}, 1, 8, None),
    ],
)
def test_hosts_are_filled_in_their_order(
    available: dict[str, int], least: int, most: int, placed: list[tuple[str, int]] | None
) -> None:
    found = supervise.place(available, least, most)
    assert (found and [*found.items()]) == placed


def test_restarts_without_a_newer_checkpoint_are_counted_and_their_pauses_grow() -> None:
    stuck = [past()] * 6
    assert [supervise.back_off_s(stuck[:count], 5) for count in range(7)] == [0, 5, 10, 20, 40, 60, 60]
    assert supervise.back_off_s([*stuck, past(before=10, after=20)], 5) == 0
    assert supervise.without_progress([past()] * 4) == 4
    assert supervise.without_progress([*[past()] * 4, past(before=5, after=6)]) == 0
    assert supervise.without_progress([past(after=1), past(), past()]) == 2


@pytest.mark.parametrize(
    ("codes", "asked_to_stop", "code"),
    [
        ([0, 0], False, 0),
        ([0, 0], True, 0),
        ([2, 2], False, 2),
        ([1, 2], False, 2),
        ([130, 130], True, 130),
        ([130, -15], True, 130),
        ([-9, 1], True, 130),
        ([130, 130], False, None),
        ([-9, 1], False, None),
        ([None, 1], False, None),
        ([0, -9], False, None),
    ],
)
def test_exit_codes(codes: list[int | None], asked_to_stop: bool, code: int | None) -> None:
    assert supervise.exit_code(past(*(end(code=each) for each in codes)), asked_to_stop) == code


def test_what_happened_is_said_in_one_line() -> None:
    full, disk = {"error": "error: the disk is full"}, "rank 0 on a ended with exit code 1 (error: the disk is full)"
    killed, was_killed = end(was_killed=True), "rank 3 on b did not end by itself and was killed; "
    lost = end(0, "a", 1, error="error: rank 0 lost another rank")
    assert past_text(past(end(), lost)) == "rank 3 on b died (signal 9, SIGKILL)"
    assert past_text(past(end(0, "a", 1, **full))) == disk
    assert past_text(past(end(code=None, error="No route to host"))) == "rank 3 on b is out of reach (No route to host)"
    hung = past(end(0, "a", 1, error="error: not there: rank 3"), killed)
    assert past_text(hung) == f"{was_killed}rank 0 on a ended with exit code 1 (error: not there: rank 3)"
    aborted = past(end(0, "a", -6, error="what(): Timeout"), killed)
    assert past_text(aborted) == f"{was_killed}rank 0 on a died (signal 6, SIGABRT: what(): Timeout)"
    crashed = past(end(0, "a", -11), killed)
    assert past_text(crashed) == "rank 0 on a died (signal 11, SIGSEGV)", "the other one waited for it"
    assert past_text(past(end(code=1), end(0, "a", 1, **full))) == f"rank 3 on b ended with exit code 1; {disk}"
    assert supervise.start_text(1250, A | C, 8) == "6 of 8 slots left; resuming at step 1,250 on 6 ranks (a:4, c:2)"
    assert supervise.start_text(0, {"a": 1}, 1) == "1 of 1 slots left; starting at the first step on 1 rank (a:1)"


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([], None),
        (["warning: a", "", "Traceback", "  line 3"], "line 3"),
        (["error: the disk is full", "warning: b"], "error: the disk is full"),
        (["error: one", "  of it", "error: two"], "error: two"),
    ],
)
def test_the_last_error_of_a_rank_is_kept_for_its_end(lines: list[str], text: str | None) -> None:
    async def taken() -> list[RankEnd]:
        news: asyncio.Queue[News] = asyncio.Queue()
        generation = Generation({"a": 1}, {"a": mock.Mock()}, news, mock.Mock())
        for line in lines:
            news.put_nowait(News("a", {"is": "line", "rank": 0, "stream": "err", "text": line}))
        news.put_nowait(News("a", {"is": "end", "rank": 0, "code": 1}))
        while not generation.is_over:
            await generation.next_news(10)
        return generation.ends

    assert [each.error for each in asyncio.run(taken())] == [text]


@pytest.mark.parametrize(("code", "grace_s"), [(1, 0), (None, 0), (0, 1_000), (STOPPED, 1_000)])
def test_where_a_rank_failed_the_others_are_killed_sooner(
    code: int | None, grace_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "FAILURE_GRACE_S", 0.0)
    monkeypatch.setattr(supervise, "END_GRACE_S", 1_000.0)

    async def signals() -> list[mock._Call]:
        news, link = asyncio.Queue[News](), mock.Mock()
        generation = Generation({"a": 2}, {"a": link}, news, mock.Mock())
        news.put_nowait(News("a", {"is": "end", "rank": 0, "code": code}))
        for _ in range(2):
            await generation.next_news(0.05)
        return link.send.mock_calls  # type: ignore[no-any-return]

    assert len(asyncio.run(signals())) == (not grace_s)
