"""Places that have little or nothing: an empty store, no runs, no pictures; pages say so, and none fails."""

import pytest

from featurestore.spec import ExtractorSpec, StoreInfo
from featurestore.store import FeatureStore
from tests.explorer.browser.watching.chromium import NARROW, too_wide, violations
from tests.explorer.browser.watching.crawl import crawl, settle
from tests.explorer.serving import pages_of

SPEC = ExtractorSpec(backbone="drawn", layer="none", weights_digest="0", preprocessing="none", compute_dtype="float32")


def empty_store(folder, world):
    FeatureStore.create(folder / "features", StoreInfo(num_shards=4, dim=16, extractor=SPEC))
    return {"store": folder / "features"}


def empty_runs(folder, world):
    (folder / "runs").mkdir()
    return {"runs": folder / "runs"}


def begun_run(folder, world):
    """A run that has not written anything yet, a folder that is none, and a file."""
    (folder / "runs/begun").mkdir(parents=True)
    (folder / "runs/note.txt").write_text("no run")
    return {"runs": folder / "runs"}


def no_pictures(folder, world):
    (folder / "images").mkdir()
    return {"store": world.store, "images": folder / "images"}


def only_store(folder, world):
    return {"store": world.store}


def only_runs(folder, world):
    return {"runs": world.runs}


def only_images(folder, world):
    return {"images": world.images}


def only_model(folder, world):
    return {"model": world.model}


def all_empty(folder, world):
    (folder / "images").mkdir()
    (folder / "samples").mkdir()
    places = {"images": folder / "images", "samples": folder / "samples"}
    return empty_store(folder, world) | empty_runs(folder, world) | places


@pytest.mark.parametrize(
    "places",
    [empty_store, empty_runs, begun_run, no_pictures, only_store, only_runs, only_images, only_model, all_empty],
)
def test_pages_of_little_say_so_and_none_fails(places, world, tmp_path, watch):
    with pages_of(**places(tmp_path, world)) as address, watch(address, width=NARROW) as page:
        site = crawl(page, f"{address}/")
        assert site.problems == []
        found = []
        for url in site.one_of_each:
            page.goto(url)
            settle(page)
            assert page.locator("main").inner_text().strip() != ""
            found += too_wide(page)
            found += violations(page).splitlines()
        assert found == []
