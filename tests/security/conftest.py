"""A store, samples, a run and a published model, for servers to start on."""

import pytest

from serving.bundle.export import ExportOptions, export_model
from tests.serving.bundle.conftest import no_network
from tests.trainer.conftest import Places, make_places
from tests.trainer.whole_runs import run_alone


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Small samples, features, the run `run` of two steps, and its model in `model`."""
    places = make_places(tmp_path_factory.mktemp("security") / "data")
    run_alone(places, run__name="run", train__max_steps=2)
    options = ExportOptions(run=places.folder / "runs" / "run")
    export_model(str(places.folder / "model"), options, network=no_network)
    return places
