"""trainer.daily under trainer.supervise: a rank is killed in the second day, and every day ends as undisturbed."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import StandingRanks
from tests.trainer.daily.test_daily import DAYS, assert_same, make_days
from tests.trainer.supervise.supervised import QUICK, TWO_HOSTS, Supervised, kill

Places = Any

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(600)]


class SupervisedDays(Supervised):
    """`run` is the second day's."""

    @property
    def run(self) -> Path:
        return self.folder / "supervised" / DAYS[1]

    def command(self) -> list[str]:
        return [
            sys.executable,
            "-m",
            "trainer.supervise",
            *QUICK,
            *TWO_HOSTS,
            "--",
            "python",
            *command("supervised", self),
        ]


def command(name: str, run: Supervised) -> list[str]:
    return [
        "-m",
        "trainer.daily",
        "--first-day",
        DAYS[0],
        "--last-day",
        DAYS[2],
        *(f"--set={each}" for each in [*run.settings, f"run.name={name}"]),
    ]


def test_a_kill_in_the_second_day_changes_nothing(
    make_places: Callable[[Path], Places], two_ranks: StandingRanks, tmp_path: Path
) -> None:
    places = make_days(make_places(tmp_path / "places"))
    steps = {"train__epochs": 3, "train__checkpoint_every": 4, "train__checkpoint_beside": False}
    run = SupervisedDays(tmp_path, places.settings(run__dir=tmp_path, **steps))
    process = run.start()
    run.wait_for_step(process, 4)
    kill(run.processes(process, Path("-m"))[1])
    assert not (run.run / "report.json").exists(), "it was killed within the day"
    said = run.end(process)
    assert "supervise: rank 1 on 127.0.0.1 died (signal 9, SIGKILL)" in said and "done after 1 restart" in said
    two_ranks.run(*command("calm", run))
    assert_same(tmp_path / "supervised", tmp_path / "calm", DAYS[:3])
