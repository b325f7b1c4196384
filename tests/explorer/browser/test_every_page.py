"""Every page of the whole shop: all links, both widths, light and dark, axe-core, charts and the keyboard."""

import shutil

import pytest

from tests.explorer.browser.watching.chromium import NARROW, WIDE, too_wide, violations, watched
from tests.explorer.browser.watching.crawl import Site, crawl, routes, settle
from tests.explorer.serving import serving
from trainer.files import DAYS_FILE

BY_FORMS = ("/runs/compare?run=both&run=ids-only",)
"""Pages that only a form leads to."""
NO_PAGES = ("/static/", "/picture")
"""What pages ask for by themselves."""
FOCUSED = """() => {
    const at = document.activeElement;
    if (!at || at === document.body) return null;
    const style = getComputedStyle(at), box = at.getBoundingClientRect();
    return {
        text: (at.getAttribute('href') || at.name || at.id || at.textContent || at.tagName).slice(0, 80),
        html: at.outerHTML.slice(0, 120),
        shown: style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 1,
        inside: box.width > 0 && box.height > 0 && box.right > 0 && box.left < innerWidth,
    };
}"""
MOST_TABS = 400


@pytest.fixture(scope="module")
def explorer(world, tmp_path_factory):
    """The whole shop, and one day of trainer.daily."""
    folder = tmp_path_factory.mktemp("days")
    own = world.copy(folder / "world")
    shutil.copytree(own.runs / "ids-only", own.runs / "days" / "2026-03-19")
    (own.runs / "days" / DAYS_FILE).write_text("{}")
    with serving(folder, *own.options(model=True)) as server:
        yield server


@pytest.fixture(scope="module")
def site(chromium, explorer) -> Site:
    found = Site()
    try:
        with watched(chromium, explorer.url) as page:
            found = crawl(page, *(explorer.url + path for path in ("/", *BY_FORMS)))
    except AssertionError as error:
        found.problems.append(str(error))
    return found


def test_every_link_leads_to_a_page_of_this_server_without_a_fault(site):
    assert site.problems == []


def test_every_kind_of_page_is_linked(site):
    pages = {route.path for route in routes() if "GET" in route.methods}
    pages = {path for path in pages if not path.startswith(NO_PAGES)}
    assert {kind.partition("?")[0] for kind in site.kinds} >= pages


@pytest.mark.parametrize(("width", "dark"), [(NARROW, True), (WIDE, False)], ids=["narrow-dark", "wide-light"])
def test_every_kind_fits_its_window_and_passes_axe(site, explorer, watch, width, dark):
    found = []
    with watch(explorer.url, width=width, dark=dark) as page:
        for url in site.one_of_each:
            page.goto(url)
            settle(page)
            found += too_wide(page)
            found += violations(page).splitlines()
    assert found == []


def test_every_chart_is_drawn_and_has_words(site, explorer, watch):
    with watch(explorer.url) as page:
        for url in site.one_of_each:
            page.goto(url)
            settle(page)
            for chart in page.locator(".plot").all():
                chart.locator("svg.main-svg").first.wait_for()
                assert chart.get_attribute("aria-label")


def test_the_keyboard_reaches_everything_and_shows_where_it_is(site, explorer, watch):
    with watch(explorer.url) as page:
        for url in site.one_of_each:
            page.goto(url)
            settle(page)
            reached = walk(page)
            assert reached[0]["text"] == "#content", url
            assert [each for each in reached if not each["shown"] or not each["inside"]] == [], url
            links = page.evaluate("[...document.querySelectorAll('nav a')].map(link => link.getAttribute('href'))")
            assert set(links) <= {each["text"] for each in reached}, url


def test_the_skip_link_leads_past_the_navigation(explorer, tab):
    page = tab(f"{explorer.url}/")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    page.keyboard.press("Tab")
    assert page.evaluate("document.querySelector('header').contains(document.activeElement)") is False


def walk(page):
    """Press Tab until the focus leaves the page, at most MOST_TABS times; what had it each time."""
    reached = []
    for _ in range(MOST_TABS):
        page.keyboard.press("Tab")
        at = page.evaluate(FOCUSED)
        if at is None:
            return reached
        reached.append(at)
    return reached
