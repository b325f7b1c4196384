"""Small trained runs of every kind of model, in one folder, to be explained."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from explorer.data.impressions.open_runs import TrainedRuns
from explorer.places import Places
from tests.serving.scoring.variants import shared_places
from tests.serving.scoring.variants import trained as trained_variant
from tests.trainer.conftest import Places as SamplePlaces


@pytest.fixture(scope="session")
def sample_places(tmp_path_factory: pytest.TempPathFactory) -> SamplePlaces:
    """Samples with a column of every kind, and two feature stores."""
    return shared_places(tmp_path_factory)


@pytest.fixture(scope="session")
def trained(sample_places: SamplePlaces) -> Callable[[str], Path]:
    """Trains a run of tests/serving/scoring/variants.py when it is first asked for; gives its folder."""
    return cache(lambda name: trained_variant(sample_places, name))


@pytest.fixture(scope="module")
def runs(sample_places: SamplePlaces) -> Iterator[TrainedRuns]:
    """The runs that have been trained so far, of which the last two stay open."""
    folder = sample_places.folder
    (folder / "runs").mkdir(exist_ok=True)
    opened = TrainedRuns(Places(runs=str(folder / "runs"), store=str(folder / "features")))
    yield opened
    opened.close()
