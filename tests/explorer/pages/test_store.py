"""The store's pages, of a shop with hostile names, of stores without pictures, of an empty one, of one that changes."""

import datetime
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from explorer.problems import Problem
from featurestore.keys import key_of_uri
from featurestore.staging import QuarantineRow
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import expire
from featurestore.upkeep.history import move_channel, pin
from tests.explorer.serving import Reader
from tests.explorer.stores import make_store, rows, storied
from tests.explorer.world import ADDED, BROKEN, CHANGED, COPY, HOSTILE, NO_IMAGE, PLAIN, REMOVED
from tests.raised import told

PAGES = ("/store", "/store/arrived", "/store/broken")


def test_the_first_page_leads_to_what_arrived_in_one_click(reader):
    first = reader.read("/store")
    yesterday = datetime.datetime.now(datetime.UTC).date() - datetime.timedelta(days=1)
    assert f"/store/arrived?since={yesterday}" in first.links
    arrived = reader.read("/store/arrived", since=yesterday)
    assert re.search(r"From snapshot 0 to 5: (\d+) added 0 changed 0 removed", arrived.text)[1] == "28"
    assert {*arrived.uris()} == {*PLAIN, *HOSTILE, *ADDED, COPY} - {BROKEN}
    assert len(arrived.pictures) == 28
    assert "No image was added" in reader.read("/store/arrived", since="2999-01-01").text


def test_a_snapshot_shows_what_came_changed_and_went(reader):
    for kind, uris in (("added", {*ADDED, COPY}), ("changed", {CHANGED}), ("removed", {REMOVED})):
        page = reader.read("/store/snapshots/2", kind=kind)
        assert {*page.uris()} == uris
        assert "3 added 1 changed 1 removed" in page.text
    gone = reader.read("/store/snapshots/2", kind="removed")
    assert f"/images/{key_of_uri(REMOVED)}?version=1" in gone.links
    assert reader.read("/store/snapshots/3").uris() == [BROKEN]  # it lost its row
    assert reader.read("/store/snapshots/4").uris() == [REMOVED]  # it is back
    assert "0 added 0 changed 0 removed" in reader.read("/store/snapshots/5").text
    assert {*reader.read("/store/snapshots/5", against=1).uris()} == {*ADDED, COPY}
    empty = reader.read("/store/snapshots/0").text
    assert "The empty store" in empty and "Changes" not in empty


def test_broken_images_have_their_reason(reader):
    page = reader.read("/store/broken")
    assert {BROKEN, NO_IMAGE} <= {*page.uris()}
    assert "not an image of a known format" in page.text


def test_what_arrived_is_asked_for_by_time_and_the_form_keeps_it(reader):
    html = reader.client.get("/store/arrived", params={"since": "2026-11-27T10:01", "until": "2999-11-28"}).text
    assert 'type="datetime-local" step="1" value="2026-11-27T10:01:00"' in html
    assert 'type="datetime-local" step="1" value="2999-11-28T00:00:00"' in html
    for beyond in ("0001-01-01T00:00:00+23:00", "9999-12-31T23:59:59-23:00"):
        assert Problem.NOT_DAY.of("since", beyond) in reader.read("/store/arrived", 400, since=beyond).text
    for until in ("2026-11-01", "2026-11-27"):
        page = reader.read("/store/arrived", 400, since="2026-11-27", until=until)
        assert Problem.NOT_LATER.of(until, "2026-11-27") in page.text


def test_a_snapshot_of_any_number_is_not_there_and_one_row_is_one(reader, tmp_path):
    assert Problem.NONE_OF_NUMBER.of("snapshot", "9" * 26) in reader.read(f"/store/snapshots/{'9' * 26}", 404).text
    assert Problem.NOT_WHOLE.of("snapshot", "-1", 0) in reader.read("/store/snapshots/-1", 400).text
    store = make_store(tmp_path / "one")
    store.put(rows(["a.jpg"], 1))
    assert "1 row and 0 tombstones in new files" in Reader(store=store.url).read("/store/snapshots/1").text


def test_since_a_time_whose_snapshots_are_gone(tmp_path):
    store, reader = storied(tmp_path / "store"), Reader(store=tmp_path / "store")
    expire(store, keep_last=1, keep_days=0, grace_days=0)
    page = reader.read("/store/arrived", since="2020-01-01")
    assert "Snapshots from then have expired or were purged. These are the changes since snapshot 4." in page.text


@pytest.mark.parametrize("path", PAGES)
def test_every_page_is_also_of_an_older_snapshot_and_says_so(reader, path):
    page = reader.read(path, version=1)
    assert "These pages show snapshot 1" in page.text
    inside = [link for link in page.links if link.partition("?")[0] in PAGES and link not in (path, "/store")]
    assert len(inside) >= 3
    assert all("version=1" in link or "since=" in link for link in inside)
    assert "has no snapshot 99" in reader.read(path, 404, version=99).text
    assert Problem.NOT_WHOLE.of("version", "1;2", 0) in reader.read(path, 400, version="1;2").text


def test_channels_name_snapshots(tmp_path):
    store, reader = storied(tmp_path / "store"), Reader(store=tmp_path / "store")
    move_channel(store, "stable", 1)
    move_channel(store, "candidate", 3)
    move_channel(store, "stable", 3)
    assert "candidate, stable" in reader.read("/store").text
    shown = reader.read("/store/arrived", version="candidate")
    assert "These pages show snapshot 3, the one of channel candidate" in shown.text
    link = f"/images/{key_of_uri('b/0.jpg')}?version=candidate"
    assert link in reader.read("/images", q="b/0", version="candidate").links
    assert "no channel 'gone'" in reader.read("/store", 404, version="gone").text
    assert Problem.NOT_VERSION.of("<i>") in reader.read("/store", 400, version="<i>").text


def test_an_expired_snapshot_is_not_there_and_its_neighbours_say_what_is_missing(tmp_path):
    store, reader = storied(tmp_path / "store"), Reader(store=tmp_path / "store")
    pin(store, "kept", 1)
    expire(store, keep_last=1, keep_days=0, grace_days=0)
    assert "2 has expired" in reader.read("/store/snapshots/2", 404).text
    page = reader.read("/store/snapshots/4")
    assert "The snapshots between 1 and 4 have expired or were purged." in page.text
    assert "5 added" in page.text
    assert "kept" in reader.read("/store").text


def test_stores_without_pictures_and_without_a_commit_have_all_pages(tmp_path):
    reader = Reader(store=storied(tmp_path / "store").url)
    texts = [reader.read(path) for path in PAGES]
    assert "Images 44" in texts[0].text and not any(page.pictures for page in texts)
    make_store(tmp_path / "empty")
    reader = Reader(store=tmp_path / "empty")
    texts = {path: reader.read(path).text for path in PAGES}
    assert "nothing was committed" in texts["/store"] and "Images 0" in texts["/store"]
    assert "No image is broken" in texts["/store/broken"]


def test_a_store_that_changes_is_shown_as_it_is_now(tmp_path):
    store, reader = make_store(tmp_path / "store"), Reader(store=tmp_path / "store")
    image = f"/images/{key_of_uri('a')}"
    assert "nothing was committed" in reader.read("/store").text
    store.put(rows(["a"], 1), "extract")
    assert "Images 1" in reader.read("/store").text
    store.put(rows(["b"], 1), "refresh")
    store.add_quarantine([QuarantineRow(7, "bad<i>.jpg", "empty file", 1e9)])
    assert "Images 2 Broken images 1" in reader.read("/store").text
    assert reader.client.get("/store").text.count("hx-get") == 0  # it is counted now
    assert "among all 2 images" in reader.read(image).text
    store.put(rows(["c"], 2))
    assert "among all 3 images" in reader.read(image).text
    assert "among all 2 images" in reader.read(image, version=2).text
    assert "Images 1" in reader.read("/store", version=1).text
    assert "i" not in reader.read("/store/broken").elements
    store.delete([key_of_uri("a")])
    assert re.search(told(Problem.NO_IMAGE_IN_SNAPSHOT, version=4), reader.read(image, 404).text)


@pytest.mark.long
def test_no_page_fails_while_a_writer_commits_compacts_and_expires(tmp_path):
    store, ended = storied(tmp_path / "store"), threading.Event()

    def write() -> None:
        number = 0
        while not ended.wait(0.02):
            number += 1
            store.put(rows([f"new/{number}"], number))
            store.delete([key_of_uri(f"new/{number - 3}")])
            if number % 3 == 0:
                compact(store, force=True)
                expire(store, keep_last=2, keep_days=0, grace_days=5 / 86_400)

    reader = Reader(store=store.url)
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write)
        try:
            for number in range(16):
                path = (*PAGES, "/images")[number % 4]
                assert reader.client.get(path, params={"wait": ("line", "changes")[number % 2]}).status_code == 200
                assert reader.client.get("/store/snapshots/5", params={"wait": "changes"}).status_code in (200, 404)
        finally:
            ended.set()
    writer.result()
