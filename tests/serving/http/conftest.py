"""A bundle of a small trained run, with a second version and newer vectors to switch to."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from featurestore.format.rows import FeatureRows
from featurestore.store import FeatureStore
from tests.running.shared import made_once, shared_folder
from tests.serving.scoring.variants import export, exported, shared_places, trained

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
        from serving.bundle.images import network_for, publish
        from serving.bundle.open import ModelVersion

        features_1D = np.random.default_rng(seed).normal(size=(1, 16)).astype(np.float32)
        store = FeatureStore.open(self.folder / "features")
        store.put(FeatureRows.of([f"item/{key - 1_000}"], features_1D, keys=np.array([key])))
        version = ModelVersion.open(self.url)
        for of in version.manifest.vectors:
            vectors = FeatureStore.open(version.vectors_url(of))
            publish(vectors, of, network_for(version, of), source_url=store.url)


@pytest.fixture(scope="session")
def published_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A variant as version 1, and another one as version 2, with their store and samples; made once a test run."""
    folder, places = shared_folder(tmp_path_factory, "published"), shared_places(tmp_path_factory)

    def publish() -> None:
        for name in ("features", "samples"):
            shutil.copytree(places.folder / name, folder / name)
        shutil.copytree(exported(places, "plain").url, folder / "models" / "ctr")
        export(trained(places, "mlp_concat"), str(folder / "models" / "ctr"), use=False)

    made_once(folder, "published", publish)
    return folder


@pytest.fixture(scope="session")
def bundle(published_once: Path) -> Published:
    """The bundle itself, for tests that only read it."""
    return Published(published_once)
