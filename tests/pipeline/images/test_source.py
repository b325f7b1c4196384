"""Folders, addresses and tables of images: keys, tags, order, mistakes, files that are none; columns of the listing."""

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec import AbstractFileSystem

from featurestore.errors import AddressError, KeyCollisionError, StorageError
from featurestore.keys import key_of_uri
from featurestore.problems import Problem as StoreProblem
from featurestore.storage import remote
from featurestore.storage.storage import Storage
from pipeline.errors import BadImageError, SourceError
from pipeline.images import source
from pipeline.images.source import ImageRef, ImageTable, list_images, read_image
from pipeline.problems import Problem
from tests.faulty import full_from
from tests.raised import raises
from tests.servers import fill

NAMES = ["a/1.jpeg", "a/z.PNG", "b.jpg"]


@pytest.fixture
def folder(tmp_path):
    for uri in (*NAMES, "notes.txt", "a/.DS_Store"):
        path = tmp_path / "images" / uri
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(uri.encode())
    return tmp_path / "images"


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(source, "BATCH_ROWS", 4)


def write_csv(folder, text):
    path = folder / "table.csv"
    path.write_text(text)
    return str(path)


def test_a_folder_gives_relative_uris_in_order_and_tags_that_change_with_the_file(folder, monkeypatch):
    listing = list_images(str(folder))
    found = [(ref.uri, ref.key, read_image(ref.location), ref.size_bytes) for ref in listing.images]
    assert found == [(name, key_of_uri(name), name.encode(), len(name)) for name in NAMES]
    assert listing.num_ignored == 2
    monkeypatch.chdir(folder.parent)
    for address in ("images", "images/", "./images", f"file://{folder}"):
        same = list_images(address)
        assert ([*same.images], same.num_ignored) == ([*listing.images], 2), "however the folder is written"
    before = list_images(str(folder)).images
    os.utime(folder / "b.jpg", (1, 1))
    (folder / "a/1.jpeg").write_bytes(b"longer than it was")
    after = list_images(str(folder)).images
    assert [a.source_tag == b.source_tag for a, b in zip(before, after, strict=True)] == [False, True, False]


def test_a_folder_that_cannot_be_listed_is_an_error_on_any_file_system(folder, monkeypatch):
    deep = folder / "deeper" / "still"
    deep.mkdir(parents=True)
    (deep / "x.jpg").write_bytes(b"x")
    assert "deeper/still/x.jpg" in [ref.uri for ref in list_images(str(folder)).images]
    scandir = os.scandir

    def refused(place):
        if str(place) == str(deep):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refused)
    with raises(SourceError, Problem.REFUSED, action="list", where=deep, reason="Permission denied"):
        list_images(str(folder))
    # The `find` of fsspec omits what it cannot list.

    class Remote(AbstractFileSystem):
        protocol = "remote"

        def ls(self, path, detail=True, **kwargs):
            here = self._strip_protocol(path)
            if here == "images/locked":
                raise PermissionError(13, "Permission denied", here)
            folders = [{"name": name, "type": "directory", "size": 0} for name in (here, f"{here}/locked")]
            return [*folders, {"name": f"{here}/a.jpg", "type": "file", "size": 1, "mtime": 1.0}]

        def info(self, path, **kwargs):
            return {"name": path, "type": "directory", "size": 0}

    monkeypatch.setattr(remote, "_client", lambda protocol, server: Remote())
    with raises(StorageError, StoreProblem.NO_PERMISSION, where="remote://images", reason=re.compile("denied")):
        list_images("remote://images")


def test_no_images_is_a_clear_error(tmp_path):
    with raises(SourceError, Problem.NO_IMAGES, where=tmp_path, ignored=0, wanted=re.compile(r"^\.jpg")):
        list_images(str(tmp_path))
    (tmp_path / "notes.txt").write_text("text")
    for address, problem, values in (
        (tmp_path, Problem.NO_IMAGES, {"ignored": 1}),
        (tmp_path / "nothing", Problem.NO_IMAGES_THERE, {}),
        (tmp_path / "notes.txt", Problem.NOT_A_FOLDER_OR_TABLE, {}),
    ):
        with raises(SourceError, problem, where=address, **values):
            list_images(str(address))
    with raises(AddressError, StoreProblem.CANNOT_OPEN, where="nosuch"):
        list_images("nosuch://bucket/images")


def test_a_table_with_ids_or_keys_of_which_each_has_one_address(folder):
    table = write_csv(folder, f"id,uri,other\n007,b.jpg,1\nshoe,a/z.PNG,2\nabs,{folder}/a/1.jpeg,3\n")
    listing = list_images(table)
    assert [(ref.key, ref.uri, read_image(ref.location)) for ref in listing.images] == [
        (key_of_uri("007"), "b.jpg", b"b.jpg"), (key_of_uri("shoe"), "a/z.PNG", b"a/z.PNG"),
        (key_of_uri("abs"), f"{folder}/a/1.jpeg", b"a/1.jpeg"),
    ]  # fmt: skip
    assert all(ref.source_tag for ref in listing.images)
    path = folder / "table.parquet"
    pq.write_table(pa.table({"key": pa.array([5, -6], pa.int32()), "uri": ["b.jpg", f"file://{folder}/a/z.PNG"]}), path)
    listing = list_images(f"file://{path}")
    assert [(ref.key, read_image(ref.location)) for ref in listing.images] == [(5, b"b.jpg"), (-6, b"a/z.PNG")]
    listing = list_images(write_csv(folder, "key,uri\n1,b.jpg\n2,a/z.PNG\n1,b.jpg\n"))
    assert ([ref.key for ref in listing.images], listing.num_ignored) == ([1, 2], 1)
    with raises(KeyCollisionError, Problem.KEY_OF_TWO_IMAGES, where=1, first="b.jpg", second="a/z.PNG"):
        list_images(write_csv(folder, "key,uri\n1,b.jpg\n1,a/z.PNG\n"))


@pytest.mark.parametrize("column", ["key", "id", "uri"])
def test_a_table_is_read_in_blocks(folder, monkeypatch, column):
    monkeypatch.setattr(source, "BATCH_ROWS", 2)
    (folder / "other.jpg").write_bytes(b"other")
    uris = ["b.jpg", "a/z.PNG", "gone.jpg", "a/1.jpeg", "other.jpg"]
    names = {"key": [4, 3, 2, 1, 0], "id": ["v", "w", "x", "y", "z"], "uri": uris}[column]
    pq.write_table(pa.table({column: names, "uri": uris}), folder / "table.parquet")
    listing = list_images(str(folder / "table.parquet"))
    assert [ref.uri for ref in listing.images] == uris
    assert [ref.key for ref in listing.images] == (names if column == "key" else [key_of_uri(name) for name in names])
    assert [ref.size_bytes for ref in listing.images] == [5, 7, -1, 8, 5]


TEXT_AS_KEY = {"column": "key", "value": "string", "wanted": "int64", "hint": ""}
NUMBER_AS_ID = {"column": "id", "value": "int64", "wanted": "string", "hint": re.compile(" key ")}


@pytest.mark.parametrize(
    ("content", "problem", "values"),
    [
        ("key,path\n1,b.jpg\n", Problem.NO_URI_COLUMN, {}),
        ("key,uri\n", Problem.NO_ROWS, {}),
        ("key,uri\nseven,b.jpg\n", Problem.REFUSED, {"action": "read"}),
        ('key,uri\n1,"b.jpg\n2,a/z.PNG\n', Problem.REFUSED, {"action": "read", "reason": re.compile("^line 2: ")}),
        ('key,uri\n2,a/z.PNG\n1,"b.jpg\n3,"\n', Problem.REFUSED, {"reason": Problem.QUOTED_LINES.of(3)}),
        ({"key": ["1"], "uri": ["b.jpg"]}, Problem.WRONG_TYPE, TEXT_AS_KEY),
        ({"id": [1], "uri": ["b.jpg"]}, Problem.WRONG_TYPE, NUMBER_AS_ID),
        ({"key": [1, None], "uri": ["b.jpg", "c.jpg"]}, Problem.EMPTY_VALUES, {"column": "key", "count": 1}),
        (b"PAR1 and nothing more", Problem.REFUSED, {"action": "read"}),
    ],
)
def test_bad_tables_are_refused(folder, content, problem, values):
    path = folder / ("table.csv" if isinstance(content, str) else "table.parquet")
    if isinstance(content, dict):
        pq.write_table(pa.table(content), path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with raises(SourceError, problem, where=path, **values):
        list_images(str(path))


def test_what_cannot_be_read_is_a_bad_image(folder):
    (missing, is_folder) = list_images(write_csv(folder, "uri\nnot-there.jpg\na\n")).images
    assert missing.source_tag == ""
    with raises(BadImageError, Problem.NO_SUCH_FILE):
        read_image(missing.location)
    with raises(BadImageError, StoreProblem.REFUSED, where=folder / "a", reason="Is a directory"):
        read_image(is_folder.location)
    with raises(BadImageError, StoreProblem.CANNOT_OPEN, where="nosuch"):
        read_image("nosuch://bucket/image.jpg")


def test_s3(s3_url):
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    place = f"{s3_url}/in"
    fs.pipe({f"{place}/b.jpg": b"bytes of b", f"{place}/deep/a.jpg": b"a", f"{place}/x.txt": b"x"})
    listing = list_images(place)
    assert [ref.uri for ref in listing.images] == ["b.jpg", "deep/a.jpg"]
    assert listing.num_ignored == 1
    requests = []
    events = Storage(s3_url)._remote.client.s3.meta.events
    events.register("before-send.s3", lambda request, **_: requests.append(request.method), unique_id="counted")
    assert read_image(next(iter(listing.images)).location) == b"bytes of b"
    events.unregister("before-send.s3", unique_id="counted")
    assert requests == ["GET"]
    fs.pipe(f"{place}/b.jpg", b"other")
    assert next(iter(list_images(place).images)).source_tag != next(iter(listing.images)).source_tag
    for name, data in (("some", b"12345"), ("empty", b"")):
        fs.pipe_file(f"{s3_url}/{name}.jpg", data)
        for most in (1, 3, 5, 100, 10_000_000):
            assert read_image(f"{s3_url}/{name}.jpg", most) == data[:most], "the first bytes, whatever its size"
    for most in ((), (3,)):
        with raises(BadImageError, Problem.NO_SUCH_FILE):
            read_image(f"{place}/none.jpg", *most)
    with raises(SourceError, Problem.NO_IMAGES, where=f"{s3_url}/out"):
        list_images(f"{s3_url}/out")


def test_s3_gives_more_than_one_page(s3_url):
    fs, bucket = fsspec.filesystem("s3", use_listings_cache=False), s3_url.removeprefix("s3://")
    fill(bucket, {f"in/{number % 7}/{number}.jpg": b"%d" % number for number in range(1030)})
    odd = {"in//twice.jpg": b"two slashes", "in/s3:/x.jpg": b"no address", "inside.jpg": b""}
    fs.pipe({f"{bucket}/{name}": data for name, data in odd.items()})
    for address, folder in ((f"{s3_url}/in/", f"{bucket}/in/"), (s3_url, f"{bucket}/")):
        listing, found = list_images(address), fs.find(folder, detail=True)
        uris = {path.removeprefix(folder).lstrip("/"): path for path in found}
        assert [ref.uri for ref in listing.images] == sorted(uris) and listing.num_ignored == 0
        for ref in listing.images:
            entry = found[uris[ref.uri]]
            assert (ref.location, ref.size_bytes) == (f"s3://{entry['name']}", entry["size"])
            assert ref.source_tag == entry["ETag"].strip('"')
    assert read_image(f"{s3_url}/in//twice.jpg") == b"two slashes"
    assert len(listing.images) == 1033


@pytest.fixture
def web(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server of the folder, which answers 410 and 503 for images called so."""

    class Handler(SimpleHTTPRequestHandler):
        def send_head(self) -> Any:
            if status := next((each for each in (410, 503) if str(each) in self.path), None):
                self.send_error(status)
                return None
            return super().send_head()

        def log_message(self, *args: Any) -> None:
            """Print nothing."""

    monkeypatch.setattr(remote, "HTTP_PATIENCE_S", 0.3)
    monkeypatch.setattr(remote, "_clients", {})
    monkeypatch.setattr(remote, "_unreached_until_s", {})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.services
def test_images_of_a_web_server(folder: Path, web: str) -> None:
    table = write_csv(folder, f"uri\n{web}/b.jpg\n{web}/a/z.PNG?size=large\n{web}/none.jpg\n")
    listing = list_images(table)
    good, sized, missing = listing.images
    assert (good.uri, good.key, good.size_bytes) == (f"{web}/b.jpg", key_of_uri(f"{web}/b.jpg"), 5)
    assert [read_image(ref.location) for ref in (good, sized)] == [b"b.jpg", b"a/z.PNG"]
    assert read_image(good.location, 3) == b"b.j"
    assert (missing.source_tag, missing.size_bytes) == ("", -1)
    with raises(BadImageError, Problem.NO_SUCH_FILE):
        read_image(missing.location)
    (folder / "b.jpg").write_bytes(b"another picture")
    tags = [[ref.source_tag for ref in each.images] for each in (listing, list_images(table))]
    assert [old == new for old, new in zip(*tags, strict=True)] == [False, True, True]
    for status, problem in ((410, StoreProblem.REFUSED), (503, StoreProblem.REFUSED_OFTEN)):
        with raises(BadImageError, problem, where=(url := f"{web}/{status}.jpg"), reason=re.compile(f"^{status}")):
            read_image(url)


@pytest.mark.services
@pytest.mark.parametrize("answers", ["refuses", "is silent"])
def test_web_servers_that_are_gone_cost_a_moment_each(folder: Path, web: str, answers: str) -> None:
    with contextlib.ExitStack() as stack:
        gone = []
        for _ in range(3):
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            gone.append("http://{}:{}".format(*listener.getsockname()))
            if answers == "is silent":
                listener.listen(0)
                stack.enter_context(socket.create_connection(listener.getsockname()))  # takes the only place
        uris = [f"{address}/{number}.jpg" for number in range(200) for address in gone]
        start_s = time.monotonic()
        listing = list_images(write_csv(folder, "\n".join(["uri", f"{web}/b.jpg", *uris])))
        good, *bad = listing.images
        assert read_image(good.location) == b"b.jpg"
        for ref in bad:
            with pytest.raises(BadImageError):
                read_image(ref.location)
        assert time.monotonic() - start_s < 20


@pytest.mark.timeout(20)
def test_pipes_sockets_and_devices_are_no_images_and_nobody_waits_for_them(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jpg")
    (folder / "link.jpg").symlink_to(folder / "pipe.jpg")
    (folder / "null.png").symlink_to("/dev/zero")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(str(folder / "socket.jpg"))
        listing = list_images(str(folder))
    assert [ref.uri for ref in listing.images] == NAMES and listing.num_ignored == 2 + 4
    good, pipe, device = list_images(write_csv(folder, "uri\nb.jpg\npipe.jpg\n/dev/zero\n")).images
    assert read_image(good.location) == b"b.jpg"
    for ref in (pipe, device):
        with raises(BadImageError, StoreProblem.REFUSED, where=ref.location, reason=StoreProblem.NOT_REGULAR):
            read_image(ref.location)


@pytest.mark.timeout(20)
def test_links_in_a_circle_end(folder: Path) -> None:
    (folder / "self.jpg").symlink_to("self.jpg")
    (folder / "a" / "up").symlink_to(folder)
    (folder / "ping").symlink_to(folder / "pong")
    (folder / "pong").symlink_to(folder / "ping")
    for number in range(12):  # followed wherever they lead, these would be 12! paths
        (folder / f"many{number}").mkdir()
        for other in range(12):
            (folder / f"many{number}" / f"to{other}").symlink_to(folder / f"many{other}")
    listing = list_images(str(folder))
    assert [ref.uri for ref in listing.images] == [*NAMES, "self.jpg"]
    with raises(BadImageError, StoreProblem.REFUSED, where=folder / "self.jpg", reason=re.compile("^Too many lev")):
        read_image([*listing.images][-1].location)


def test_links_lead_to_files_and_folders_also_outside(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "more").mkdir(parents=True)
    (outside / "c.jpg").write_bytes(b"c")
    (outside / "more" / "d.jpg").write_bytes(b"d")
    (folder / "file.jpg").symlink_to(outside / "c.jpg")
    (folder / "gone.jpg").symlink_to(outside / "gone.jpg")
    (folder / "x").symlink_to(outside)
    (folder / "y").symlink_to(outside)  # the same folder again
    (folder / "z").symlink_to(folder / "a")  # listed as itself
    found = {ref.uri: ref for ref in list_images(str(folder)).images}
    assert list(found) == [*NAMES, "file.jpg", "gone.jpg", "x/c.jpg", "x/more/d.jpg"]
    assert read_image(found["file.jpg"].location) == b"c" and read_image(found["x/more/d.jpg"].location) == b"d"
    with raises(BadImageError, Problem.NO_SUCH_FILE):
        read_image(found["gone.jpg"].location)
    os.utime(outside / "c.jpg", (1, 1))
    later = {ref.uri: ref for ref in list_images(str(folder)).images}
    assert later["file.jpg"].source_tag != found["file.jpg"].source_tag


def ref(number, uri=None, **fields):
    uri = uri or f"{number}.jpg"
    return ImageRef(number, uri, f"file:///in/{uri}", f"tag {number}", 10 * number)._replace(**fields)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 23])
def test_rows_come_back_in_their_order(count):
    refs = [ref(number) for number in np.random.default_rng(0).permutation(count).tolist()]
    for base in ("file:///in/", "s3://elsewhere/"):
        table = ImageTable.of(iter(refs), base)
        assert [*table] == refs == table.refs(np.arange(count)) and len(table) == count
        assert table.keys().tolist() == [each.key for each in refs]
        assert table.sizes().tolist() == [each.size_bytes for each in refs]


def test_rows_are_sorted_by_uri_as_python_does():
    names = ["b", "a", "a/b", "a-b", "\U0001f600", "\ue000", "Z", "é", "", "aa", "a\0"]
    refs = [ref(number, f"{name}.jpg") for number, name in enumerate(names)]
    assert [*ImageTable.of(refs, by_uri=True)] == sorted(refs, key=lambda each: each.uri)


def test_places_may_be_asked_in_any_order_and_what_a_row_lacks_stays_away():
    refs = [ref(number) for number in range(23)]
    table = ImageTable.of(refs)
    index = np.random.default_rng(0).integers(23, size=50)
    assert table.refs(index) == [refs[place] for place in index]
    found = table.take(index, "size_bytes", "uri")
    assert found.column_names == ["size_bytes", "uri"]
    assert found["size_bytes"].to_pylist() == [10 * place for place in index]
    assert table.take(index[:0], "key").num_rows == 0 and table.refs(index[:0]) == []
    refs = [ref(1, source_tag="", size_bytes=-1), ref(2, location=""), ref(3, location="/x/3.jpg")]
    table = ImageTable.of(refs, "file:///in/")
    assert [*table] == refs
    assert table.has_tag().tolist() == [False, True, True]


def test_the_first_of_equal_rows_stays_and_the_first_collision_is_told():
    order = [3, 1, 1, 3, 2, 0, 3, 5, 1, 4, 1]
    table = ImageTable.of(ref(number, size_bytes=place) for place, number in enumerate(order))
    assert [(each.key, each.size_bytes) for each in table] == [(3, 0), (1, 1), (2, 4), (0, 5), (5, 7), (4, 9)]
    assert len(ImageTable.of(ref(7) for _ in range(30))) == 1
    rows = [*(ref(number) for number in range(9)), *(ref(number) for number in range(5)), ref(3, "x"), ref(2, "y")]
    with raises(KeyCollisionError, Problem.KEY_OF_TWO_IMAGES, where=3, first="3.jpg", second="x"):
        ImageTable.of(rows)
    with raises(KeyCollisionError, Problem.KEY_OF_TWO_IMAGES, where=1, first="a", second="b"):
        ImageTable.of([ref(1, "b"), ref(1, "a")], by_uri=True)


def test_a_full_disk_is_told_with_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(source, "BATCH_ROWS", 4096)
    full = raises(SourceError, Problem.NO_ROOM_FOR_LISTING, where=tmp_path, reason="File too large")
    with full_from(100_000), full:
        ImageTable.of(ref(number) for number in range(20_000))
    assert not list(tmp_path.iterdir())
