"""The variants of tests/serving/scoring/variants.py, each published once without its network."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from featurestore.log import manifest_path
from featurestore.parsing import parse_json
from featurestore.storage.storage import Storage
from serving.bundle import log
from serving.bundle.export import ExportOptions, export_model
from serving.bundle.files import WrittenFiles
from serving.bundle.manifest import BUNDLES, NETWORK, BundleManifest
from tests.featurestore.storage.test_paths import sealed
from tests.running.shared import made_once
from tests.serving.scoring.variants import Exported, Variants, shared_places
from tests.serving.scoring.variants import exported as exported_variant
from trainer.runs.saved import SavedRun


def no_network(saved: SavedRun, files: WrittenFiles) -> None:
    """In the place of the network, where a test looks at everything else."""
    files.write(NETWORK, b"none")


def export(url: object, run: Path, **options: Any) -> BundleManifest:
    return export_model(str(url), ExportOptions(run=run, **options), network=no_network).manifest


def with_versions(made: Exported, count: int) -> Path:
    """A model with so many versions of a bundle, each put in use in their order; made once, only to be copied."""
    name = f"{Path(made.url).name}-{count}"
    folder = made.places.folder / "versions" / name

    def make() -> None:
        shutil.copytree(made.url, folder)
        for _ in range(count - 1):
            export(folder, made.run)

    made_once(made.places.folder, f"versions-{name}", make)
    return folder


def forge(url: object, version: int, **fields: Any) -> None:
    """Seal the manifest of a version again, with other values in some of its fields."""
    storage, path = Storage(str(url)), manifest_path(version)
    values = {**parse_json(storage.read_bytes(path)), **fields}
    values.pop("digest")
    storage.write_bytes(path, sealed(values))


def flipped(data: bytes, place: int) -> bytes:
    """Change one bit."""
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def versions_there(url: object) -> list[int]:
    """Return the versions whose manifests are there; theirs have to be the only files."""
    storage, bundles = Storage(str(url)), Path(str(url), BUNDLES)
    known = log.known_versions(storage)
    folders = {path.relative_to(bundles).parts[0] for path in bundles.rglob("*") if path.is_file()}
    assert folders == {log.read_version(storage, version).bundle_id for version in known}
    return known


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Variants:
    """Gives a variant by its name; tests only read it."""
    places = shared_places(tmp_path_factory)
    return cache(lambda name: exported_variant(places, name, "bundles", export))
