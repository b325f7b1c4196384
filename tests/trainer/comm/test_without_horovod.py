"""Everything that runs on ranks also runs where there is no Horovod: under torchrun, and alone."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import TorchRanks, command_of, environment
from tests.trainer.whole_runs import SHARED, report_of

Places = Any

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes in which `import horovod` fails."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['horovod'] = None\n")
    inherited = environment()
    return {**inherited, "PYTHONPATH": os.pathsep.join([str(folder), inherited["PYTHONPATH"]])}


def run(bare: dict[str, str], ranks: int, *arguments: object) -> str:
    """Run `python ARGUMENTS` on ranks without Horovod; return what they print."""
    done = subprocess.run(
        command_of(ranks, *arguments), env=bare, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_training_and_evaluation(places: Places, alone: Path, tmp_path: Path, bare: dict[str, str]) -> None:
    settings = places.settings(run__dir=tmp_path, run__name="two", train__max_steps=30, **SHARED)
    said = run(bare, TorchRanks(2), "-m", "trainer.main", "--set", *settings)
    assert "2 ranks on cpu, collectives: Gloo by torch.distributed" in said
    two, one = (report_of(run_folder)["metrics"]["gauc"] for run_folder in (tmp_path / "two", alone))
    assert two == pytest.approx(one, abs=1e-9)
    evaluated = run(bare, TorchRanks(2), "-m", "trainer.evaluate", tmp_path / "two", "--bootstrap", 0)
    assert " impressions, 2 ranks\n" in evaluated
    assert " impressions, 1 rank\n" in run(bare, 1, "-m", "trainer.evaluate", tmp_path / "two", "--bootstrap", 0)
