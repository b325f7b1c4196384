"""What all pages share: escaping, addresses and the files that stand for them, and pages of a list."""

import json

import pytest
from starlette.requests import Request

from explorer.html.query import Paging
from explorer.html.site import LEFT_OUT, NavItem, Site, address, file_of, relative, script_json
from explorer.places import Places

HOSTILE = "</script><script>alert(1)</script>&\u2028"


def test_json_in_a_script_cannot_end_it_and_is_the_same_json() -> None:
    text = str(script_json({"name": HOSTILE}))
    assert "<" not in text and ">" not in text and "&" not in text and "\u2028" not in text
    assert json.loads(text) == {"name": HOSTILE}


@pytest.mark.parametrize(
    ("asked", "count", "paging"),
    [("", 10, (1, 3, 0)), ("page=3", 10, (3, 3, 8)), ("page=99", 10, (3, 3, 8)), ("page=1", 0, (1, 1, 0))],
)
def test_pages_of_a_list(asked: str, count: int, paging: tuple[int, int, int]) -> None:
    found = Paging.of(Request({"type": "http", "query_string": asked.encode()}), count, 4)
    assert (found.page, found.num_pages, found.first) == paging


def test_a_frozen_site_lists_each_address_once_and_no_more_than_its_limit() -> None:
    site = Site(Places(images="x"), frozen=True, most_files=4)
    site.text("/", "home.html", title="x")
    assert site.linked == ["/", "/static/style.css"]
    site.nav = [NavItem("A", "/a"), NavItem("A again", "/a"), NavItem("B", "/b")]
    text = site.text("/", "home.html", title="x")
    assert site.linked == ["/", "/static/style.css", "/a"]
    assert LEFT_OUT in text


def test_addresses_are_quoted_and_each_has_a_plain_file_of_its_own() -> None:
    assert address("/store", {"b": 2, "a": "x y&z", "c": None}) == "/store?a=x+y%26z&b=2"
    names = ["../../etc/passwd", HOSTILE, "a\"b'c&d", "\u202egpj.exe", "ü/ö.png", "x" * 5000, "a b\nc", "a/b", "a-b"]
    files = [file_of(address("/picture", {"uri": uri, "size": size})) for uri in names for size in (96, 160)]
    assert len(set(files)) == len(files)
    assert all(file.startswith("pictures/") and file.endswith(".jpg") and file.isascii() for file in files)
    assert all(len(file) < 100 and ".." not in file and file.count("/") == 1 for file in files)
    assert relative("static/style.css", "pages/a.html") == "../static/style.css"
    assert relative("pages/b.html", "pages/a.html") == "b.html"
    assert relative("pages/b.html", "index.html") == "pages/b.html"
