"""Names that would be elements, attributes, scripts, templates or other addresses stay names, wherever they show."""

import re

import pytest

from featurestore.keys import key_of_uri
from featurestore.text import printable
from tests.explorer.browser.watching.crawl import settle
from tests.explorer.serving import pages_of
from tests.explorer.world import BROKEN_IN, HOSTILE, HOSTILE_BROKEN, NO_IMAGE

INJECTED = """[...document.querySelectorAll(
    "script:not([src]):not([type='application/json']), img[src='x'], [onclick], [onerror], [onmouseover], "
    + "a[href^='javascript:'], b")].filter(each => each.localName != 'b' || /png|alert/.test(each.textContent))
    .map(each => each.outerHTML)"""


def shown(page) -> str:
    """The text of the page, white space as one space."""
    return " ".join(page.locator("main").text_content().split())


def plain(name: str) -> str:
    """A name as a page shows it."""
    return " ".join(printable(name).split())


@pytest.mark.parametrize("name", HOSTILE, ids=[f"name-{number}" for number in range(len(HOSTILE))])
def test_the_page_of_an_image_with_a_hostile_name(explorer, tab, name):
    page = tab(f"{explorer.url}/images/{key_of_uri(name)}")
    settle(page)
    assert page.evaluate(INJECTED) == []
    assert plain(name) in shown(page)
    assert page.evaluate("[...document.images].filter(image => image.complete && !image.naturalWidth).length") == 0


def test_galleries_and_searches_show_all_names(explorer, world, tab):
    page = tab(f"{explorer.url}/store/snapshots/1")
    settle(page)
    text = shown(page)
    assert [name for name in HOSTILE if plain(name) not in text] == []
    assert page.evaluate(INJECTED) == []
    for asked in (
        "<script>alert(1)</script>",
        "\"'><img src=x onerror=alert(1)>",
        "{{7*7}}",
        "\u202e",
        "%",
        "\\",
        "\n",
    ):
        page.goto(f"{explorer.url}/images")
        page.get_by_label("Key, uri").fill(asked)
        page.get_by_role("button", name="Search").click()
        settle(page)
        assert page.evaluate(INJECTED) == []


def test_broken_pictures_are_told_with_their_reason(explorer, tab):
    page = tab(f"{explorer.url}/store/broken")
    settle(page)
    text = shown(page)
    assert HOSTILE_BROKEN in text and NO_IMAGE in text and "truncated" in text
    assert page.evaluate(INJECTED) == []
    page.goto(f"{explorer.url}/store/snapshots/{BROKEN_IN}")
    settle(page)
    assert page.evaluate(INJECTED) == []


@pytest.mark.parametrize(
    "path",
    [
        "/<script>alert(1)</script>",
        "/images/<img src=x onerror=alert(1)>",
        "/images/1?run=<script>alert(1)</script>",
        "/store/snapshots/<b onclick=alert(1)>",
        "/runs/<b onclick=alert(1)>",
        "/runs/..%2f..%2fetc",
        "/runs/compare?run=<b onclick=alert(1)>&run=both",
        "/impressions?run=<b onclick=alert(1)>",
        "/impressions/both/<b>",
        "/store/arrived?since=<script>alert(1)</script>",
        "/static/<script>alert(1)</script>",
    ],
)
def test_a_hostile_address_is_a_page_that_says_no(explorer, tab, path):
    page = tab(f"{explorer.url}/")
    page.seen.expected_status.update((400, 404))
    answer = page.goto(explorer.url + path)
    settle(page)
    assert answer.status in (400, 404)
    assert page.evaluate(INJECTED) == []
    assert "Traceback" not in page.content()


def test_runs_with_hostile_names_are_inert(world, tmp_path, watch):
    names = ["<script>alert(1)<", "a&b=c?d#e", "quote'\"quote", "\u202eesrever", "x" * 200, "%2e%2e"]
    for name in names:
        (tmp_path / "runs" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "runs" / name).symlink_to(world.runs / "both")
    with pages_of(runs=tmp_path / "runs", samples=world.samples) as address, watch(address) as page:
        page.goto(f"{address}/runs")
        settle(page)
        assert page.evaluate(INJECTED) == []
        links = page.evaluate("[...document.querySelectorAll('main th a')].map(link => link.href)")
        assert len(links) == len(names)
        for link in links:
            assert re.match(rf"{address}/runs/[^/?#]+$", link)
            page.goto(link)
            settle(page)
            assert page.evaluate(INJECTED) == []
