"""Small pictures: never from outside their place, within their memory, anew when the file is, grey where one lacks."""

import io
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
from PIL import Image

from explorer.data import pictures as module
from explorer.data.pictures import SIZES, Pictures, placeholder
from explorer.problems import Problem
from tests.explorer.world import draw
from tests.pipeline.conftest import draw_photo, encode_image


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    draw(folder, "a/1.jpg", 1)
    draw(folder, "b.png", 2)
    draw(tmp_path, "outside.jpg", 3)
    return folder


def size_of(picture):
    return Image.open(io.BytesIO(picture.jpeg)).size


@pytest.mark.parametrize(("asked", "given"), [(-1, 96), (0, 96), (96, 96), (97, 160), (500, 800), (10**9, 800)])
def test_sizes_are_rounded_up_to_few(folder, asked, given):
    (folder / "large.jpg").write_bytes(encode_image(draw_photo(5, 1600, 400)))
    assert size_of(Pictures(str(folder)).get("large.jpg", asked)) == (given, given // 4)


OUTSIDE = [
    "../outside.jpg", "a/../../outside.jpg", "a/1.jpg/../../../outside.jpg", "..\\outside.jpg", "%2e%2e/outside.jpg",
    "%252e%252e%252foutside.jpg", "link.jpg", "linked/outside.jpg", "/etc/passwd", "/proc/self/environ",
    "file:///etc/passwd", "http://127.0.0.1/x.jpg", "~root/x.jpg",
]  # fmt: skip
NO_PICTURE = ["a/1.jpg\0", "\ud800.jpg", "n" * 5000, "a" + "/a" * 3000, "..", ".", "a", "", "loop", "pipe"]


@pytest.mark.parametrize("uri", OUTSIDE + NO_PICTURE)
def test_nothing_but_a_picture_below_the_place_is_given(folder, tmp_path, uri):
    (folder / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    pictures = Pictures(str(folder))
    found = pictures.get(uri, 96)
    assert found.problem in (Problem.NO_PICTURE, Problem.REFUSED, Problem.BROKEN)
    assert size_of(found) == (96, 96)


def test_what_leads_below_the_place_is_given_however_it_is_written(folder):
    (folder / "inside.jpg").symlink_to(folder / "a" / "1.jpg")
    whole = str(folder / "a/1.jpg"), f"file://{folder}/a/1.jpg"
    for place in (str(folder), f"file://{folder}"):
        for uri in ("a/1.jpg", "./a/1.jpg", "a//1.jpg", "a/../b.png", "inside.jpg", *whole):
            assert Pictures(place).get(uri, 96).problem == "", (place, uri)


def test_a_place_on_an_object_store_gives_what_is_below_it():
    files, data = fsspec.filesystem("memory"), encode_image(draw_photo(1))
    for path in ("/pictures-of-test/a/1.jpg", "/other-of-test/2.jpg"):
        files.pipe_file(path, data)
    pictures = Pictures("memory://pictures-of-test")
    for uri in ("a/1.jpg", "memory://pictures-of-test/a/1.jpg"):
        assert pictures.get(uri, 96).problem == ""
    refused = "../other-of-test/2.jpg", "/other-of-test/2.jpg", "a/../1.jpg", "..", "memory://other-of-test/2.jpg"
    assert all(pictures.get(uri, 96).problem == Problem.REFUSED for uri in refused)
    assert pictures.get("a/none.jpg", 96).problem == Problem.NO_PICTURE


def test_a_far_picture_is_read_once_a_minute(monkeypatch):
    fsspec.filesystem("memory").pipe_file("/minute-of-test/1.jpg", encode_image(draw_photo(1)))
    reads, real = [], module.read_image
    monkeypatch.setattr(module, "read_image", lambda *args: reads.append(args) or real(*args))
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    pictures = Pictures("memory://minute-of-test")
    for now[0] in (0, 30, 59, 61, 100):
        pictures.get("1.jpg", 96)
    assert len(reads) == 2


def test_a_file_that_is_replaced_gives_the_new_picture(folder):
    pictures = Pictures(str(folder))
    before = pictures.get("b.png", 96).jpeg
    assert pictures.get("b.png", 96).jpeg is before
    draw(folder, "b.png", 99)
    assert pictures.get("b.png", 96).jpeg != before
    (folder / "b.png").write_bytes(b"no picture")
    assert pictures.get("b.png", 96).problem == Problem.BROKEN
    (folder / "b.png").unlink()
    assert pictures.get("b.png", 96).problem == Problem.NO_PICTURE


def test_memory_has_a_limit_and_what_was_used_last_stays(folder, monkeypatch):
    monkeypatch.setattr(module, "CACHE_BYTES", 20_000)
    pictures, given = Pictures(str(folder)), []
    for number in range(40):
        draw(folder, f"{number}.jpg", number)
        given.append(pictures.get(f"{number}.jpg", 96).jpeg)
        assert pictures.get("0.jpg", 96).jpeg is given[0]
    assert pictures._kept._values.currsize <= 20_000 < sum(map(len, given))
    assert pictures.get("1.jpg", 96).jpeg is not given[1]


def test_a_file_that_is_too_large_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 100)
    assert Pictures(str(folder)).get("a/1.jpg", 96).problem == Problem.BROKEN
    fsspec.filesystem("memory").pipe_file("/large-of-test/1.jpg", encode_image(draw_photo(1)))
    assert Pictures("memory://large-of-test").get("1.jpg", 96).problem == Problem.BROKEN


def test_few_pictures_are_made_at_once_however_many_are_asked_for(folder, monkeypatch):
    at_once, most, real, full = [], [], module.shrunk, threading.Event()

    def made(*args):
        at_once.append(1)
        most.append(len(at_once))
        if len(at_once) == module.AT_ONCE:
            full.set()
        assert full.wait(60)
        time.sleep(0.01)
        at_once.pop()
        return real(*args)

    monkeypatch.setattr(module, "shrunk", made)
    for number in range(12):
        draw(folder, f"{number}.jpg", number)
    pictures = Pictures(str(folder))
    with ThreadPoolExecutor(36) as pool:
        list(pool.map(lambda number: pictures.get(f"{number % 12}.jpg", 96), range(36)))
    assert max(most) == module.AT_ONCE
    assert 12 <= len(most) <= 12 * module.AT_ONCE


def test_without_a_place_every_picture_is_grey():
    for size in SIZES:
        assert Pictures(None).get("a.jpg", size) == placeholder(Problem.NO_PICTURE, size)
