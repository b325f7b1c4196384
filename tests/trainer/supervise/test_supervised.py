"""Real ranks under trainer.supervise that are killed and stopped, and stand-ins that hang or are lost."""

import random
import re
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.raised import told
from tests.ranks import StandingRanks
from tests.trainer.checkpoints import damage
from tests.trainer.conftest import make_days
from tests.trainer.daily.test_daily import DAYS, assert_same_days
from tests.trainer.runs.resumed.legs import Killed, Leg, assert_no_step_or_sample_is_lost
from tests.trainer.runs.saved import save
from tests.trainer.supervise.supervised import TIMEOUT_S, TWO_HOSTS, Supervised, kill
from trainer.launch import AGENT
from trainer.problems import Problem

Settings = Callable[..., list[str]]
STEPS = 80

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]


@pytest.fixture(scope="session")
def whole(settings_of: Settings, tmp_path_factory: pytest.TempPathFactory) -> Leg:
    """The first steps of one rank that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return Killed(folder, settings_of(folder, STEPS, 1000)).leg(0, ranks=1)


@pytest.mark.cluster
@pytest.mark.long(40)
def test_the_supervisor_and_a_rank_are_lost(settings_of: Settings, tmp_path: Path, whole: Leg) -> None:
    """The supervisor is killed; meanwhile the file that rank 1 reads next is cut, as by a host that lost its power. The
    second supervisor continues by torch.distributed what Horovod's ranks have begun, and one of its ranks is killed;
    one of Horovod's: the last test."""
    run = Supervised(tmp_path, settings_of(tmp_path, STEPS, 10, run__deadline_s=5))
    process = run.start(PAUSE_S="0.05")
    run.wait_for_step(process, 20)
    kill(psutil.Process(process.pid))
    run.end(process, -signal.SIGKILL)
    assert max(run.legs()[-1].losses) < STEPS, "no rank continues without its supervisor"
    step, rows = run.newest_step(), "rows-00001-of-00002.safetensors"
    file = f"{run.run}/checkpoints/step-{step:08}/{rows}"
    damage(run.run, step, rows, "cut")
    run.options = (*TWO_HOSTS, "--by", "torch")
    process = run.start(PAUSE_S="0.05")
    run.wait_for_step(process, 50)
    by_torch = run.victims(process, "rank", 2)[0]
    assert "MASTER_PORT" in (variables := by_torch.environ()) and "HOROVOD_RANK" not in variables
    kill(by_torch)
    said = " ".join(run.end(process).split())
    assert "supervise: rank 0 on localhost died (signal 9, SIGKILL)" in said
    assert f"warning: step-{step:08} is skipped, and kept as damaged-step-{step:08} in " in said
    changed = told(Problem.CHECKPOINT_FILE_CHANGED, where=file).partition(";")[0]
    assert re.search(rf"{changed}; continuing from step {step - 10}", said)
    assert "2 of 2 slots left; resuming at step " in said
    assert f"supervise: done after 1 restart, with step {STEPS}" in said
    legs = run.legs()
    assert len(legs) == 3 and legs[1].first_step == step - 10 + 1
    assert_no_step_or_sample_is_lost(legs, whole, STEPS)


STAND_IN = """
import os, signal, sys, time
from pathlib import Path

signal.signal(signal.SIGTERM, lambda *_: ((folder / f"stopped-{rank}").touch(), sys.exit(130)))
rank, folder = os.environ.get("HOROVOD_RANK", "0"), Path(__file__).parent
(folder / f"started-{os.environ['SUPERVISE_GENERATION']}-{rank}").touch()
while rank != "0" or not (folder / "late").exists():
    time.sleep(0.05)
(folder / "late").unlink()
sys.exit("error: not there: rank 1")
"""
"""In the place of the trainer: ends by SIGTERM as that does and, on rank 0, as one whose other rank is late."""


@pytest.mark.cluster
@pytest.mark.long(15)
def test_a_rank_hangs_a_host_is_lost_and_a_signal_ends_all(tmp_path: Path) -> None:
    """What real ranks do then: the tests below."""
    worker = tmp_path / "worker.py"
    worker.write_text(STAND_IN)
    settings = [f"run.dir={tmp_path}", "run.name=run"]
    run = Supervised(tmp_path, settings, program=[worker])

    def wait_for(generation: int, rank: int) -> None:
        run.wait(process, (tmp_path / f"started-{generation}-{rank}").exists)

    process = run.start()
    wait_for(0, 1)
    kill(run.processes(process, worker)[1], signal.SIGSTOP)
    (tmp_path / "late").touch()
    wait_for(1, 1)
    kill(run.processes(process, AGENT)[1])
    run.wait(process, lambda: any(tmp_path.glob("started-[2-9]-1")))
    process.send_signal(signal.SIGTERM)
    said = run.end(process, 130)
    assert "supervise: rank 1 on 127.0.0.1 did not end by itself and was killed; rank 0 on localhost ended" in said
    assert "stopping: the ranks may write a checkpoint, for 300 s (--stop-grace-s); a second signal ends them" in said
    assert "is out of reach" in said and (tmp_path / "stopped-1").exists()
    assert re.search(r"stopped after [2-4] restarts, with step 0; the same command continues the run", said)


@pytest.mark.slow
def test_a_rank_stops_and_the_same_command_goes_on_with_the_hosts_that_are_there(
    settings_of: Settings, tmp_path: Path, whole: Leg
) -> None:
    """A signal has the run write a checkpoint, from which the same command continues with another host too; the stopped
    rank is named and replaced; at last the host continues alone."""
    run = Supervised(tmp_path, settings_of(tmp_path, STEPS, 1000, run__deadline_s=5), ["--hosts", "localhost:1"])

    def wait_for_leg(number: int) -> None:
        run.wait(process, lambda: len(legs := run.legs()) >= number and bool(legs[-1].losses))

    process = run.start(PAUSE_S="0.1")
    wait_for_leg(1)
    process.send_signal(signal.SIGTERM)
    run.end(process, 130)
    run.options = TWO_HOSTS
    process = run.start(PAUSE_S="0.1")
    wait_for_leg(2)
    kill(run.processes(process)[1], signal.SIGSTOP)
    wait_for_leg(3)
    process.send_signal(signal.SIGTERM)
    said = run.end(process, 130)
    assert re.search(told(Problem.LATE_RANKS, limit=5, rank=0, ranks="rank 1"), said)
    step = run.newest_step()
    assert 0 < step < STEPS
    assert f"stopped after 1 restart, with step {step}; the same command continues the run" in said
    run.options = ["--hosts", "127.0.0.1:1"]
    assert f"resuming at step {step} on 1 rank" in run.end(run.start())
    legs = run.legs()
    assert [leg.num_ranks for leg in legs] == [1, 2, 2, 1]
    joined = len(legs[0].losses) + 1
    assert [leg.first_step for leg in legs] == [1, joined, joined, step + 1], "only the stopped rank's steps are lost"
    assert_no_step_or_sample_is_lost(legs, whole, STEPS)


def test_it_gives_up_where_nothing_helps(settings_of: Settings, tmp_path: Path) -> None:
    """As where the newest checkpoint is damaged; a program that says no more than that stands for the trainer."""
    options = ["--max-np", "1", "--max-restarts-without-progress", "1"]
    worker = tmp_path / "damaged.py"
    run = Supervised(tmp_path, settings_of(tmp_path, STEPS, 1000), options, [worker])
    save(run.run, 5)
    damaged = run.run / "checkpoints" / "step-00000005" / "state.json"
    worker.write_text(f"import sys; sys.exit('error: {damaged} is damaged')")
    said = run.end(run.start(), 1)
    assert said.count("resuming at step 5 on 1 rank (localhost:1)") == 2
    assert f"rank 0 on localhost ended with exit code 1 (error: {damaged}" in said
    assert "2 starts in a row came to no checkpoint after step 5; giving up" in said


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills_at_any_moment(settings_of: Settings, tmp_path: Path) -> None:
    """Ranks, agents and the supervisor get SIGKILL, whatever they do just then; the supervisor is started again."""
    steps, kills, draw = 1_020, 20, random.Random(0)
    calm = Killed(tmp_path / "calm", settings_of(tmp_path / "calm", steps, 10_000)).leg(0, ranks=1)
    run = Supervised(tmp_path, settings_of(tmp_path, steps, 20, train__checkpoint_beside=True))
    process = run.start()
    for number in range(kills):
        run.wait_for_step(process, (number + 1) * steps // (kills + 4))
        run.wait_for_step(process, run.newest_step() + draw.randrange(40))
        kind = draw.choice(["rank", "rank", "agent", "supervisor"])
        kill(draw.choice(run.victims(process, kind)))
        if kind == "supervisor":
            run.end(process, -signal.SIGKILL)
            process = run.start()
    run.end(process, timeout_s=4 * TIMEOUT_S)
    legs = run.legs()
    assert len(legs) > kills // 2
    assert_no_step_or_sample_is_lost(legs, calm, steps)


@pytest.mark.slow
def test_a_kill_in_the_second_day_changes_nothing(two_ranks: StandingRanks, tmp_path: Path) -> None:
    steps = {"train__epochs": 3, "train__checkpoint_every": 4, "train__checkpoint_beside": False}
    settings = make_days(tmp_path / "places").settings(run__dir=tmp_path, **steps)
    days = ["-m", "trainer.daily", "--first-day", DAYS[0], "--last-day", DAYS[2]]
    run = Supervised(tmp_path, [*settings, "run.name=supervised"], program=days, name=f"supervised/{DAYS[1]}")
    process = run.start()
    run.wait_for_step(process, 4)
    kill(run.processes(process, Path("-m"))[1])
    assert not (run.run / "report.json").exists(), "it was killed within the day"
    said = run.end(process)
    assert "supervise: rank 1 on 127.0.0.1 died (signal 9, SIGKILL)" in said and "done after 1 restart" in said
    two_ranks.run(*days, "--set", *settings, "run.name=calm")
    assert_same_days(tmp_path / "supervised", tmp_path / "calm", DAYS[:3])
