"""Everything that runs on ranks also runs where there is no Horovod: under torchrun, and alone."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import StandingRanks, TorchRanks, command_of, environment, standing_ranks
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


@pytest.fixture(scope="module")
def bare_ranks(bare: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandingRanks]:
    """Two ranks of torchrun in that environment."""
    with standing_ranks(tmp_path_factory.mktemp("bare-ranks"), TorchRanks(2), bare) as ranks:
        yield ranks


def test_training_and_evaluation(
    places: Places, alone: Path, tmp_path: Path, bare: dict[str, str], bare_ranks: StandingRanks
) -> None:
    settings = places.settings(run__dir=tmp_path, run__name="two", train__max_steps=30, **SHARED)
    said = bare_ranks.run("-m", "trainer.main", "--set", *settings)
    assert "2 ranks on cpu, collectives: Gloo by torch.distributed" in said
    two, one = (report_of(run_folder)["metrics"]["gauc"] for run_folder in (tmp_path / "two", alone))
    assert two == pytest.approx(one, abs=1e-9)
    evaluate = ("-m", "trainer.evaluate", tmp_path / "two", "--bootstrap", 0)
    assert " impressions, 2 ranks\n" in bare_ranks.run(*evaluate)
    done = subprocess.run(command_of(1, *evaluate), env=bare, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0 and " impressions, 1 rank\n" in done.stdout, done.stdout + done.stderr
