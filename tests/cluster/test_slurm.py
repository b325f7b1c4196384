"""Training as a job of Slurm, by the project's own batch scripts (docs/SLURM.md): a node fails, the time is over."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cluster.hosts import ROOT, Network, lacking_packages
from tests.cluster.runs import Shop, open_shop
from tests.cluster.slurm import Slurm
from tests.trainer.runs.legs import Killed, Leg

SCRIPTS = ROOT / "deploy" / "slurm"


@pytest.fixture(scope="module")
def shop(net: Network, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return open_shop(net, tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def slurm(net: Network) -> Slurm:
    if missing := lacking_packages("slurmctld"):
        pytest.skip(f"jobs of Slurm need {missing}")
    slurm = Slurm(net, "s3", ["a", "b"])
    slurm.open()
    return slurm


@pytest.fixture(scope="module")
def whole(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Leg:
    """The run of two ranks on loopback."""
    return shop.alone(tmp_path_factory.mktemp("alone"), 2)


class Training:
    """A job of train.sbatch whose ranks note their steps, and what it printed."""

    def __init__(self, slurm: Slurm, shop: Shop, folder: Path, *changes: str, options: Sequence[str] = ()) -> None:
        self.slurm, self._folder, self.log = slurm, folder, folder / "log.txt"
        noted = {"NOTES": str(folder), "PYTHONPATH": f"{ROOT / 'tests' / 'cluster' / 'noted'}:{ROOT}"}
        settings = [word for each in (*shop.settings_on_s3(folder), *changes) for word in ("--set", each)]
        self.job = slurm.submit(
            SCRIPTS / "train.sbatch", *settings, options=[f"--output={self.log}", *options],
            env={**shop.s3, **noted, "VENV": sys.prefix},
        )  # fmt: skip

    def wait_for_step(self, step: int, leg: int = 0) -> None:
        file = self._folder / f"notes-{leg}" / "0-of-2.jsonl"
        end = time.monotonic() + 120
        while not file.exists() or len(file.read_text().splitlines()) < 2 * step:  # two lines a step
            assert time.monotonic() < end, self.output()
            time.sleep(0.02)

    def wait(self) -> str:
        return self.slurm.wait(self.job, 200)

    def legs(self, count: int) -> list[Leg]:
        return [Killed(self._folder, []).seen(number, 2) for number in range(count)]

    def output(self) -> str:
        return (self.log.read_text() if self.log.exists() else "") + self.slurm.log()


def test_two_nodes_train_as_two_ranks_of_one_machine(slurm: Slurm, shop: Shop, whole: Leg, tmp_path: Path) -> None:
    training = Training(slurm, shop, tmp_path)
    assert training.wait() == "COMPLETED", training.output()
    (leg,) = training.legs(1)
    assert leg.samples == whole.samples and leg.losses == whole.losses
