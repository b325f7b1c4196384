"""A store made of drawn images, its refresh, and what both say."""

import os
import shutil

import pytest

from featurestore.store import FeatureStore
from pipeline.features.refresh import extract, refresh
from pipeline.network.backbone import Backbone
from pipeline.options import ExtractOptions, RefreshOptions
from tests.featurestore.contents import metadata_of
from tests.pipeline.conftest import draw_photo, encode_image
from tests.pipeline.network.tiny import TINY


@pytest.fixture
def write(tmp_path):
    """Draws pictures into the folder of images: write(name=seed); a text in place of a seed is written as it is."""
    folder = tmp_path / "images"
    folder.mkdir()

    def write(**seeds):
        for name, seed in seeds.items():
            data = seed.encode() if isinstance(seed, str) else encode_image(draw_photo(seed))
            (folder / f"{name}.jpg").write_bytes(data)
        return folder

    return write


@pytest.fixture
def make(client, tmp_path):
    """Extracts the images into a new store."""

    def make(images, store="features", cluster=client, **options):
        settings = {"backbone": TINY, "dtype": "float32", "precision": "float32", "num_shards": 4}
        settings |= {"weights": "random:0"} | options
        place = store if "://" in store else str(tmp_path / store)
        return extract(ExtractOptions(images=str(images), store=place, **settings), cluster)

    return make


@pytest.fixture
def made(write, make):
    """Draws pictures into the folder of images, and extracts them into a new store."""

    def made(**seeds):
        make(folder := write(**seeds))
        return folder

    return made


@pytest.fixture
def run(client, tmp_path):
    """Refreshes the store."""
    own = {"store": str(tmp_path / "features")}
    return lambda images, cluster=client, **options: refresh(
        RefreshOptions(images=str(images), **own | options), cluster
    )


@pytest.fixture
def computed(monkeypatch):
    """Images of each pass through the network."""
    rows, features = [], Backbone.features

    def counted(network, pixels_BHWC):
        rows.append(len(pixels_BHWC))
        return features(network, pixels_BHWC)

    monkeypatch.setattr(Backbone, "features", counted)
    return rows


def counts(summary):
    """new, changed, touched, unchanged, gone, quarantined, resolved, duplicates"""
    return (
        summary.num_new, summary.num_changed, summary.num_touched, summary.num_unchanged, summary.num_gone,
        len(summary.bad), summary.num_resolved, summary.num_duplicates,
    )  # fmt: skip


def rows_of(store):
    """Everything that a store says of each image, features included."""
    snapshot = FeatureStore.open(store).snapshot()
    table = metadata_of(snapshot).sort_by("key")
    features = snapshot.get(table["key"].to_numpy())
    return {row["uri"]: (*row.values(), bits.tobytes()) for row, bits in zip(table.to_pylist(), features, strict=True)}


def touch(path, seconds=100):
    os.utime(path, (path.stat().st_mtime - seconds,) * 2)


def change_everything(folder, write):
    """Of six images a, b, c, d, e, f: one stays, one changes, one is touched, one moves, one is copied, one goes."""
    write(b=20, new=30, new_too=30, text="no image")
    touch(folder / "c.jpg")
    (folder / "d.jpg").rename(folder / "moved.jpg")
    shutil.copy(folder / "e.jpg", folder / "copy.jpg")
    (folder / "f.jpg").unlink()
