"""Everything that runs on ranks also runs where there is no Horovod: by torch.distributed, and alone."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import StandingRanks, TorchRanks, environment, forks_of_ranks, standing_ranks
from tests.trainer.standing_ranks import run as run_here
from tests.trainer.whole_runs import SHARED, all_alike, report_of

Places = Any

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def bare_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandingRanks]:
    """Two ranks of torch in which `import horovod` fails."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['horovod'] = None\n")
    bare = {"PYTHONPATH": os.pathsep.join([str(folder), environment()["PYTHONPATH"]])}
    with (
        forks_of_ranks(bare) as forks,
        standing_ranks(forks, tmp_path_factory.mktemp("bare-ranks"), TorchRanks(2)) as ranks,
    ):
        yield ranks


@pytest.mark.usefixtures("undrawn")
def test_training_and_evaluation(
    places: Places, alone: Path, tmp_path: Path, bare_ranks: StandingRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = places.settings(run__dir=tmp_path, run__name="two", train__max_steps=30, **SHARED)
    said = bare_ranks.run("-m", "trainer.main", "--set", *settings)
    assert "2 ranks on cpu, collectives: Gloo by torch.distributed" in said
    two, one = (report_of(run_folder)["metrics"] for run_folder in (tmp_path / "two", alone))
    assert two == all_alike(one, within=1e-9)
    evaluate = ("-m", "trainer.evaluate", tmp_path / "two", "--bootstrap", 0)
    assert " impressions, 2 ranks\n" in bare_ranks.run(*evaluate)
    monkeypatch.setitem(sys.modules, "horovod", None)  # what is imported at once has been imported by the two ranks
    code, said = run_here(list(map(str, evaluate)))
    assert code == 0 and " impressions, 1 rank\n" in said, said
