"""A bundle with a second version and newer vectors to switch to; and the server of a fake model, without sockets."""

import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import numpy as np
import pytest

from featurestore.format.datafile import FeatureRows
from featurestore.store import FeatureStore
from serving.bundle.images import network_for, publish
from serving.bundle.open import ModelVersion
from serving.http.app import Scoring
from tests.running.shared import made_once, shared_folder
from tests.serving.http.fakes import SLOW, FakeSource, client_of, scoring_of, write_state
from tests.serving.scoring.variants import export, exported, shared_places, trained

NEW_IMAGE = 1_050


@dataclass(frozen=True)
class Published:
    """A bundle with versions 1, in use, and 2."""

    folder: Path

    @property
    def url(self) -> str:
        return str(self.folder / "models" / "ctr")

    @property
    def samples(self) -> Path:
        return self.folder / "samples" / "test" / "day=2026-01-01.parquet"

    def add_image(self, key: int = NEW_IMAGE, seed: int = 0) -> None:
        """Add an image to the feature store, or change one, and publish its vector."""
        features_1D = np.random.default_rng(seed).normal(size=(1, 16)).astype(np.float32)
        store = FeatureStore.open(self.folder / "features")
        store.put(FeatureRows.of([f"item/{key - 1_000}"], features_1D, keys=np.array([key])))
        version = ModelVersion.open(self.url)
        for of in version.manifest.vectors:
            vectors = FeatureStore.open(version.vectors_url(of))
            publish(vectors, of, network_for(version, of), source_url=store.url)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """A variant as version 1, and another one as version 2, with their store and samples; made once a test run."""
    folder, places = shared_folder(tmp_path_factory, "published"), shared_places(tmp_path_factory)

    def publish() -> None:
        for name in ("features", "samples"):
            shutil.copytree(places.folder / name, folder / name)
        shutil.copytree(exported(places, "plain").url, folder / "models" / "ctr")
        export(trained(places, "concat"), str(folder / "models" / "ctr"), use=False)

    made_once(folder, "published", publish)
    return Published(folder)


@pytest.fixture
def anyio_backend() -> str:
    """Tests that are coroutines run in asyncio's own loop."""
    return "asyncio"


@pytest.fixture
def scoring(request: pytest.FixtureRequest, tmp_path: Path) -> Scoring:
    """The parts of a server with version 3 of a fake model; the mark `scorer` has settings of both."""
    mark = request.node.get_closest_marker("scorer")
    settings = dict(mark.kwargs) if mark else {}
    slow = {name: settings.pop(name) for name in SLOW if name in settings}
    return scoring_of(FakeSource(write_state(tmp_path, version=3, vectors={"images": 7}, **slow)), **settings)


@pytest.fixture
async def client(scoring: Scoring) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of that server without sockets, once its model is loaded."""
    async with client_of(scoring) as client:
        yield client
