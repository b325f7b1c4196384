"""A store, its pictures and a table of addresses on an object store: the pages are those of a disk."""

import fsspec
import pytest

from featurestore import key_of_uri
from featurestore.upkeep.remake import remake
from tests.explorer.pages.reading import Reader
from tests.explorer.stores import DIM, make_store, rows, storied
from tests.pipeline.conftest import draw_photo, encode_image

PAGES = ("/store", "/store/arrived", "/store/broken", "/images")


def fill(url: str) -> None:
    store = make_store(f"{url}/features")
    store.put(rows(["a/1.jpg", "a/2.jpg", "none.jpg"], 1, [1, 1, 2]))
    store.put(rows(["a/3.jpg"], 2, [3]))
    files, root = fsspec.core.url_to_fs(url)
    for number in (1, 2, 3):
        files.pipe_file(f"{root}/images/a/{number}.jpg", encode_image(draw_photo(number)))


def test_on_s3(s3_url):
    fill(s3_url)
    reader = Reader(store=f"{s3_url}/features", images=f"{s3_url}/images")
    texts = {path: reader.read(path) for path in PAGES}
    assert "Images 4" in texts["/store"].text
    assert {*texts["/store/arrived"].uris()} == {"a/1.jpg", "a/2.jpg", "a/3.jpg", "none.jpg"}
    key = key_of_uri("a/3.jpg")
    assert "among all 4 images" in reader.client.get(f"/images/{key}", params={"wait": "spaces"}).text
    given = reader.client.get("/picture", params={"uri": "a/3.jpg", "size": 96})
    assert "x-picture-problem" not in given.headers
    for uri, problem in (("none.jpg", "no picture"), ("../features/store.json", "refused")):
        assert reader.client.get("/picture", params={"uri": uri}).headers["x-picture-problem"] == problem


@pytest.mark.parametrize("dims", [2, 5])
def test_a_compact_store_says_so_and_compares_its_own_numbers(tmp_path, dims):
    remake(storied(tmp_path / "store"), tmp_path / "compact", dims=dims)
    reader = Reader(store=tmp_path / "compact")
    assert f"{dims} of {DIM} numbers" in reader.read("/store").text
    page = reader.client.get(f"/images/{key_of_uri('a/5.jpg')}", params={"wait": "spaces"})
    assert f"features of {dims} of {DIM} numbers, exactly, among all 44 images" in page.text
