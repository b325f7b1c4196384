"""The images' pages: search, browsing, an image over time, its neighbours, and a picture that is sent."""

import re
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest

from explorer.data import visual
from explorer.pages import images as pages
from explorer.problems import Problem
from featurestore import FeatureStore, key_of_uri
from featurestore.text import count_text
from featurestore.upkeep.remake import remake
from tests.explorer.serving import Reader, Reading, client_of
from tests.explorer.stores import make_store, storied
from tests.explorer.world import ADDED, BROKEN, COPIED, COPY, HOSTILE, PLAIN, UNKNOWN
from tests.raised import told


@pytest.fixture
def everything(world):
    return Reader(store=world.store, images=world.images, runs=world.runs, samples=world.samples)


def of_space(page_text, title, following):
    return page_text.partition(title)[2].partition(following)[0]


def picture(data):
    return {"files": {"picture": ("p.jpg", data, "image/jpeg")}}


def test_browsing_leads_to_every_image(reader, shop):
    found, addresses = set(), ["/images"]
    for address in addresses:
        page = reader.read(address)
        found |= {*page.uris()}
        addresses += [link for link in page.links if link.startswith("/images?") and link not in addresses]
    assert found == {*PLAIN, *HOSTILE, *ADDED, COPY} - {BROKEN}


def test_a_part_of_a_uri_finds_images_and_an_older_snapshot_has_others(reader):
    assert {*reader.read("/images", q="SHOES/shoe-0").uris()} == {*PLAIN[:10]} - {BROKEN}
    assert BROKEN in reader.read("/images", q="shoes/", version=2).uris()
    older = reader.read("/images", q="shoes/", version=2)
    assert all("version=2" in link for link in older.links if link.startswith("/images/"))
    assert "0 found of 28 images" in reader.read("/images", q="<i>").text


def test_a_broken_image_has_a_page_and_one_that_is_not_in_the_snapshot_has_none(reader):
    broken = reader.read(f"/images/{key_of_uri(BROKEN)}")
    assert "not in snapshot 5: cannot be decoded" in broken.text
    assert "Nearest neighbours" not in broken.text
    for uri, version in ((ADDED[0], 1), (UNKNOWN, 5)):
        missing = Problem.NO_IMAGE_IN_SNAPSHOT.of(key := key_of_uri(uri), version)
        assert missing in reader.read(f"/images/{key}", 404, version=version).text
    for large in ("9" * 25, f"-{'9' * 25}", "9" * 5_000):
        assert Problem.NO_IMAGE.of(large[:40]) in reader.read(f"/images/{large}", 404).text
    for bad in ("x", "1.5", "%20", "-"):
        found = reader.read(f"/images/{bad}", 400).text
        assert re.search(told(Problem.NOT_WHOLE, where="key", value=bad.replace("%20", " ")), found)


def test_neighbours_by_features_and_visual_vectors(everything, reader):
    key = key_of_uri(COPIED)
    page = everything.read(f"/images/{key}", run="both")
    features = of_space(page.text, "exactly, among all 28 images.", "Visual vectors")
    assert features.split("1.000")[0].strip() == COPY  # the same bytes, the same feature
    for words in ("the run both", "both-longer", "only here", "Where the lists differ is what the run learned"):
        assert words in page.text
    assert "ids-only" not in page.text
    assert "/impressions?q=shoes%2Fshoe-03.jpg" in page.links
    for run in ("ids-only", "../both"):
        assert Problem.NO_RUN_OF_IMAGES.of(run) in everything.read(f"/images/{key}", 404, run=run).text
    page = reader.read(f"/images/{key}")
    assert "name the folder of runs by --runs" in page.text and "only here" not in page.text
    assert not [link for link in page.links if "impressions" in link]


@pytest.fixture
def slow(monkeypatch):
    """Visual vectors wait after 3 of 28 images; which runs they were asked of, and what lets them go."""
    real, asked, go = visual.visual_vectors, [], threading.Event()

    def compute(run, *, progress, **places):
        asked.append(run.name)
        progress(3, 28)
        assert go.wait(60)
        return real(run, progress=progress, **places)

    monkeypatch.setattr(visual, "visual_vectors", compute)
    yield asked, go
    go.set()


def test_visual_vectors_are_computed_beside_the_page_one_run_at_a_time(everything, slow, monkeypatch, world):
    asked, go = slow
    path = f"/images/{key_of_uri(COPIED)}"
    answer = everything.client.get(path, params={"wait": "spaces", "run": "both"})  # it comes while they are computed
    page = Reading(answer.text)
    assert "computes the visual vectors of both (3 of 28)" in page.text
    assert "exactly, among all 28 images." in page.text  # neighbours by features are there
    (part_of,) = page.live
    monkeypatch.setattr("explorer.html.site._POLL_S", 0.05)
    other = everything.client.get(path, params={"wait": "spaces", "run": "both-longer"})
    assert "waits for other work to end" in Reading(other.text).text
    assert asked == ["both"]
    assert "(3 of 28)" in everything.client.get(part_of).text
    monkeypatch.setattr(pages, "_PATIENCE_S", 0.05)
    sent = Reading(send(everything, (world.images / PLAIN[5]).read_bytes(), run="both").text)
    assert "computes the visual vectors of both (3 of 28)" in sent.text
    assert "Send the picture again when they are there" in sent.text
    go.set()
    assert 'id="spaces" hx-get=' in answer.text
    whole = everything.read(path, run="both")
    assert "the run both" in whole.text
    assert whole.live == []


def test_an_export_waits_for_visual_vectors(world, slow):
    told = []

    def doing(text):
        told.append(text)
        slow[1].set()

    with client_of(world.places(), frozen=True, doing=doing) as client:
        text = Reading(client.get(f"/images/{key_of_uri(COPIED)}").text).text
    assert "the run both" in text
    assert "computes the visual vectors of both (3 of 28)" in told


def test_a_store_without_pictures_and_an_empty_one_have_the_pages(shop, tmp_path):
    reader = Reader(store=storied(tmp_path / "store").url)
    assert reader.read(f"/images/{key_of_uri('a/5.jpg')}").pictures == []
    assert "a picture of yours cannot be compared" in reader.read("/images").text
    answer = send(reader, (shop.images / PLAIN[0]).read_bytes())
    assert answer.status_code == 400
    assert Problem.UNKNOWN_NETWORK in Reading(answer.text).text
    reader = Reader(store=make_store(tmp_path / "empty").url)
    assert "no images yet" in reader.read("/images").text
    assert "0 found" in reader.read("/images", q="x").text
    assert reader.read("/images/7", 404)


def send(reader, data, **fields):
    return reader.client.post("/images/like", data=fields, **picture(data))


def test_a_picture_that_is_sent_finds_its_own_image_first(everything, world):
    answer = send(everything, (world.images / PLAIN[5]).read_bytes(), run="both")
    assert answer.status_code == 200
    page = Reading(answer.text)
    features = of_space(page.text, "exactly, among all 28 images.", "Visual vectors")
    assert features.split()[:2] == [PLAIN[5], "1.000"]
    visual = of_space(page.text, "makes of each image, exactly, among all 28 images.", "Read-only")
    assert visual.split()[:2] == [PLAIN[5], "1.000"]
    assert page.pictures[0].startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_of_a_compact_store_a_picture_gets_the_coordinates_of_its_rows(shop, tmp_path, dtype):
    remake(FeatureStore.open(shop.store), tmp_path / "compact", dims=12, dtype=dtype)
    reader = Reader(store=tmp_path / "compact")
    assert "12 of 576 numbers" in reader.read("/store").text
    text = Reading(send(reader, (shop.images / PLAIN[5]).read_bytes()).text).text
    assert "Cosine of features of 12 of 576 numbers" in text
    first, cosine = of_space(text, "exactly, among all 28 images.", "Visual vectors").split()[:2]
    assert first == PLAIN[5]
    assert float(cosine) > 0.99


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (picture(b""), Problem.NOTHING_SENT),
        (picture(b"<script>alert(1)</script>"), "not an image of a known format"),
        (picture(b"\xff\xd8\xff" + bytes(100)), "cannot be decoded"),
        (picture(bytes(11_000_000)), Problem.LARGE_PICTURE.of(10)),
        ({"data": {"picture": "x"}}, Problem.NOT_FORM),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, Problem.UNREADABLE_FORM.of("")),
    ],
    ids=["nothing", "a script", "half a JPEG", "too large", "a text", "no form"],
)
def test_what_is_no_picture_or_too_large_is_refused(reader, sent, message):
    answer = reader.client.post("/images/like", **sent)
    assert answer.status_code == 400
    assert message in Reading(answer.text).text
    assert Problem.NOT_SENT in reader.read("/images/like", 405).text


def test_images_are_filtered_and_sorted_over_all_shards(everything, reader):
    shoes = everything.read("/images", folder="shoes")
    assert {*shoes.uris()} == {*PLAIN} - {BROKEN}
    assert "11 found of 28 images" in shoes.text
    assert "new since snapshot 1" in shoes.text
    new = everything.read("/images", new="yes").uris()
    assert {*new} == {*ADDED, COPY}
    assert everything.read("/images", sort="new").uris()[: len(new)] == new
    assert Problem.NEEDS_RUNS in reader.read("/images", sort="ctr").text
    for name, bad in (("sort", "x"), ("new", "perhaps")):
        unknown = told(Problem.UNKNOWN_CHOICE, where=name, value=bad)
        assert re.search(unknown, everything.read("/images", 400, **{name: bad}).text)


def test_a_filter_stays_on_the_next_page_and_in_the_form(everything, monkeypatch):
    monkeypatch.setattr(pages, "PER_PAGE", 5)
    first = everything.read("/images", folder="shoes", sort="ctr", q="shoe")
    (following,) = [link for link in first.links if "page=2" in link]
    assert all(each in following for each in ("folder=shoes", "sort=ctr", "q=shoe"))
    second = everything.read(following)
    assert len(second.uris()) == 5 and not {*first.uris()} & {*second.uris()}
    html = everything.client.get(following).text
    assert re.search(r'<option value="shoes" selected>shoes \(11\)', html)
    assert '<option value="ctr" selected>' in html and 'value="shoe"' in html


def test_the_list_is_polled_until_all_names_are_read(reader, monkeypatch):
    go, real = threading.Event(), pages.make_catalogue

    def later(*args):
        assert go.wait(60)
        return real(*args)

    monkeypatch.setattr(pages, "make_catalogue", later)
    answer = Reading(reader.client.get("/images", params={"folder": "shoes", "sort": "new"}).text)
    assert "Listing all images" in answer.text and answer.pictures == []
    (part,) = answer.live
    assert all(each in part for each in ("wait=found", "folder=shoes", "sort=new"))
    go.set()
    assert {*reader.read(part).uris()} == {*PLAIN} - {BROKEN}


def test_an_image_has_its_category_impressions_and_ctr(everything, reader, world):
    key, shown = key_of_uri(COPIED), []
    for group in pq.read_table(world.samples / "test", partitioning=None).to_pylist():
        ads = zip(group["ad_image"], group["label"], group["ad_category"], strict=True)
        shown += [(label, category) for image, label, category in ads if image == key]
    text = everything.read(f"/images/{key}").text
    clicks = sum(label for label, _ in shown)
    assert f"Category {shown[-1][1]} Impressions as an ad {len(shown)} in the test samples" in text
    assert f"CTR {clicks / len(shown):.4f}: {count_text(clicks, 'click')}" in text
    assert "Price" not in text  # the samples have none
    assert "Impressions as an ad 0 in the test samples" in reader.read(f"/images/{key}").text


def test_nothing_of_a_picture_reaches_the_disk(reader, shop, monkeypatch):
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", None)  # which makes the file
    data = (shop.images / PLAIN[0]).read_bytes()
    assert send(reader, data + bytes(3_000_000)).status_code == 200  # what follows a JPEG is not looked at


def test_pictures_wait_for_each_other_and_after_a_while_for_none(reader, shop, monkeypatch):
    started, goes_on = threading.Event(), threading.Event()
    real = pages.feature_of_picture

    def slow(*args):
        started.set()
        goes_on.wait(20)
        return real(*args)

    monkeypatch.setattr(pages, "feature_of_picture", slow)
    data = (shop.images / PLAIN[0]).read_bytes()
    with reader.client, ThreadPoolExecutor(2) as pool:  # one loop for all requests
        first = pool.submit(send, reader, data)
        assert started.wait(20)
        with monkeypatch.context() as impatient:
            impatient.setattr(pages, "_BUSY_S", 0.05)
            busy = send(reader, data)
        assert (busy.status_code, first.done()) == (503, False)
        assert Problem.BUSY in Reading(busy.text).text
        second = pool.submit(send, reader, data)
        time.sleep(0.3)  # it waits for the first one
        goes_on.set()
        assert [each.result().status_code for each in (first, second)] == [200, 200]
