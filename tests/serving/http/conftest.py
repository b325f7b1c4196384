"""A bundle of a small trained run, with a second version and newer vectors to switch to."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from featurestore.format.rows import FeatureRows
from featurestore.store import FeatureStore
from tests.running.shared import made_once, shared_folder
from tests.trainer.conftest import make_places

NEW_IMAGE = 1_050


@dataclass(frozen=True)
class Published:
    """A bundle with versions 1, in use, and 2."""

    folder: Path

    @property
    def url(self) -> str:
        """Of the bundle."""
        return str(self.folder / "models" / "ctr")

    @property
    def samples(self) -> Path:
        """A file of test samples."""
        return self.folder / "samples" / "test" / "day=2026-01-01.parquet"

    def use(self, version: int) -> None:
        """Put a version in use."""
        from featurestore.storage.storage import Storage
        from serving.bundle.log import use

        use(Storage(self.url), version)

    def add_image(self, key: int = NEW_IMAGE, seed: int = 0) -> None:
        """Add an image to the feature store, or change one, and publish its vector."""
        from serving.bundle.images import networks_for, publish
        from serving.bundle.open import ModelVersion

        features_1D = np.random.default_rng(seed).normal(size=(1, 16)).astype(np.float32)
        store = FeatureStore.open(self.folder / "features")
        store.put(FeatureRows.of([f"item/{key - 1_000}"], features_1D, keys=np.array([key])))
        version = ModelVersion.open(self.url)
        for of in version.manifest.vectors:
            vectors = FeatureStore.open(version.vectors_url(of))
            publish(vectors, of, networks_for(version, of), source_url=store.url)


@pytest.fixture(scope="session")
def published_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two runs and publish both, once a test run."""
    folder = shared_folder(tmp_path_factory, "published")
    made_once(folder, "published", lambda: _publish(folder))
    return folder


def _publish(folder: Path) -> None:
    from serving.bundle.export import ExportOptions, export_model, write_network
    from trainer.comm import SoloComm
    from trainer.config.config import load_config
    from trainer.main import train

    places = make_places(folder)
    for number in (1, 2):
        changes = {"train__seed": number, "train__max_steps": 20, "train__epochs": 1, "data__missing": "zeros"}
        config = load_config(settings=places.settings(run__name=f"run{number}", **changes))
        train(config, SoloComm())
        options = ExportOptions(run=Path(config.run.dir) / f"run{number}", use=number == 1)
        export_model(str(places.folder / "models" / "ctr"), options, network=write_network)


@pytest.fixture(scope="session")
def bundle(published_once: Path) -> Published:
    """The bundle itself, for tests that only read it."""
    return Published(published_once)
