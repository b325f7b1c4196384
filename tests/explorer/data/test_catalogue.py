"""The table of all images: searched, filtered and sorted, against plain loops over the store's rows."""

from pathlib import Path

import numpy as np
import pytest

from explorer.data import catalogue
from explorer.data.ads import AdFigures, nothing_known
from explorer.data.background import Task
from explorer.data.catalogue import SORTS, Catalogue, ImageQuery, make_catalogue
from explorer.data.map import folder_of
from featurestore import key_of_uri
from featurestore.store import FeatureStore
from tests.explorer.stores import ADDED, CHANGED, make_store, rows, storied

PART = ["a/", "1", ".JPG", "B/3", "nothing", "a/1%", "*", "\\", "[", " "]


def figures() -> AdFigures:
    """Make figures of the images a/0.jpg to a/9.jpg: number n has 10 n impressions, and n clicks but for the last."""
    keys = np.array([key_of_uri(f"a/{number}.jpg") for number in range(10)])
    order, numbers = np.argsort(keys), np.arange(10)
    return AdFigures(
        keys_I=keys[order],
        impressions_I=(10 * numbers)[order],
        clicks_I=np.where(numbers < 9, numbers, 60)[order],
        category_I=np.array(["even" if number % 2 == 0 else "odd" for number in numbers], object)[order],
        price_I=np.where(numbers < 5, numbers, np.nan)[order],
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return storied(tmp_path_factory.mktemp("catalogue") / "store")


@pytest.fixture(scope="module")
def listed(store: FeatureStore) -> Catalogue:
    return make_catalogue(store, store.snapshot(), figures(), Task())


def uris(found: Catalogue, **asked: object) -> list[str]:
    return [image.uri for image in found.images(found.find(ImageQuery(**asked)))]  # type: ignore[arg-type]


def all_uris(store: FeatureStore, version: int | None = None) -> set[str]:
    return set(store.snapshot(version).to_arrow(["uri"])["uri"].to_pylist())


def test_all_images_are_listed_by_name(store: FeatureStore, listed: Catalogue) -> None:
    assert uris(listed) == sorted(all_uris(store)) and len(listed) == 44
    older = make_catalogue(store, store.snapshot(1), figures(), Task())
    assert uris(older) == sorted(all_uris(store, 1))
    assert listed.folders == {"a": 39, "b": 5}
    assert listed.categories == {"even": 5, "odd": 5}


@pytest.mark.parametrize("part", PART)
def test_a_part_finds_what_a_loop_finds_in_all_shards(store: FeatureStore, listed: Catalogue, part: str) -> None:
    assert uris(listed, text=part) == sorted(uri for uri in all_uris(store) if part.lower() in uri.lower())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (str(key_of_uri("a/5.jpg")), ["a/5.jpg"]),
        (str(key_of_uri("a/11.jpg")), []),  # it is not in the snapshot
        *((text, []) for text in ("-", "1e5", "9" * 30, "-9223372036854775809", "²", "9" * 5_000)),
    ],
)
def test_a_key_finds_its_image_and_what_is_no_key_nothing(listed: Catalogue, text: str, found: list[str]) -> None:
    assert uris(listed, text=text) == found


def test_filters_go_together(listed: Catalogue) -> None:
    assert uris(listed, folder="b") == sorted(ADDED)
    assert uris(listed, category="odd") == [f"a/{number}.jpg" for number in (1, 3, 5, 7, 9)]
    assert uris(listed, category="odd", text="3") == ["a/3.jpg"]
    assert uris(listed, category="odd", folder="b") == uris(listed, category="none") == []


def test_new_images_came_within_a_day_or_after_the_first_snapshot(
    store: FeatureStore, listed: Catalogue, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert listed.new_since == 1
    assert uris(listed, is_new=True) == sorted(ADDED) and listed.num_new == len(ADDED)
    assert uris(listed, is_new=True, text="a/") == [], "images that changed are not new"
    first = make_catalogue(store, store.snapshot(1), figures(), Task())
    assert (first.new_since, first.num_new) == (1, 0)
    other = storied(tmp_path / "store")
    monkeypatch.setattr(catalogue, "_NEW_S", -1.0)  # all snapshots are older
    assert make_catalogue(other, other.snapshot(), figures(), Task()).num_new == 0
    assert CHANGED


def test_orders(listed: Catalogue) -> None:
    rest = sorted(set(uris(listed)) - {f"a/{number}.jpg" for number in range(10)})
    most = uris(listed, sort="impressions")
    assert most[:9] == [f"a/{number}.jpg" for number in range(9, 0, -1)]
    assert most[9:] == sorted(["a/0.jpg", *rest])
    best = uris(listed, sort="ctr")
    assert best[0] == "a/9.jpg"
    assert best[1:9] == uris(listed, sort="low_ctr")[7::-1], "CTRs of few impressions are drawn to the mean"
    assert best[9:] == sorted(["a/0.jpg", *rest]) == uris(listed, sort="low_ctr")[9:]
    assert uris(listed, sort="price")[:5] == [f"a/{number}.jpg" for number in range(4, -1, -1)]
    assert uris(listed, sort="new")[:5] == sorted(ADDED)
    assert all(sorted(uris(listed, sort=sort)) == uris(listed) for sort in SORTS)


def test_an_image_has_its_figures(listed: Catalogue) -> None:
    (image,) = listed.images(listed.find(ImageQuery(text="a/3.jpg")))
    assert (image.category, image.impressions, image.price, image.is_new) == ("odd", 30, 3.0, False)
    assert image.ctr == pytest.approx(0.1)
    (new,) = listed.images(listed.find(ImageQuery(text="b/3.jpg")))
    assert (new.category, new.impressions, new.ctr, new.price, new.is_new) == ("", 0, None, None, True)


def test_the_names_are_read_once(store: FeatureStore, listed: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_names", None)
    again = make_catalogue(store, store.snapshot(), nothing_known("no samples"), Task())
    assert uris(again) == uris(listed) and again.categories == {}


def test_an_empty_store_and_names_of_all_kinds(tmp_path: Path) -> None:
    empty = make_store(tmp_path / "empty")
    found = make_catalogue(empty, empty.snapshot(), figures(), Task())
    assert len(found) == found.num_new == 0 and uris(found, text="x", sort="ctr") == []
    names = ["s3://bag/x.jpg", "c.jpg", "a/b/c.jpg", "line\nbreak/x.png", "/abs/y.jpg"]
    made = make_store(tmp_path / "names")
    made.put(rows(names, 1))
    found = make_catalogue(made, made.snapshot(), figures(), Task())
    assert found.names["folder"].to_pylist() == [folder_of(uri) for uri in sorted(names)]
