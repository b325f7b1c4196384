"""Tests of what all pages share: escaping, cutting into pages, and JSON inside of pages."""

import json

from explorer.html.site import LEFT_OUT, NavItem, Site, pages_of, script_json
from explorer.places import Places

HOSTILE = "</script><script>alert(1)</script>&\u2028"


def test_json_in_a_script_cannot_end_it_and_is_the_same_json() -> None:
    text = str(script_json({"name": HOSTILE}))
    assert "<" not in text and ">" not in text and "&" not in text and "\u2028" not in text
    assert json.loads(text) == {"name": HOSTILE}


def test_names_are_escaped_in_pages() -> None:
    site = Site(Places(images=HOSTILE))
    text = site.text("/", "home.html", title=HOSTILE)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


def test_pages_of_a_list() -> None:
    items = list(range(10))
    assert pages_of(items, 1, 4) == ([0, 1, 2, 3], 3)
    assert pages_of(items, 3, 4) == ([8, 9], 3)
    assert pages_of(items, 99, 4) == ([8, 9], 3)
    assert pages_of(items, -5, 4) == ([0, 1, 2, 3], 3)
    assert pages_of([], 1, 4) == ([], 1)


def test_a_frozen_site_lists_each_address_once_and_no_more_than_its_limit() -> None:
    site = Site(Places(images="x"), frozen=True, most_files=4)
    site.text("/", "home.html", title="x")
    assert site.linked == ["/", "/static/style.css"]
    site.nav = [NavItem("A", "/a"), NavItem("A again", "/a"), NavItem("B", "/b")]
    text = site.text("/", "home.html", title="x")
    assert site.linked == ["/", "/static/style.css", "/a"]
    assert LEFT_OUT in text
