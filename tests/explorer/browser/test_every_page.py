"""Every page, of the whole shop, of an export of it, and of places that have little: all links, both widths, light and
dark, axe-core, charts, the keyboard, and names that would be elements or scripts."""

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli import ran
from tests.explorer.browser.watching.chromium import DESK, NARROW, WIDE, cut, too_wide, violations, watched
from tests.explorer.browser.watching.crawl import Site, crawl, routes, settle
from tests.explorer.serving import EXPLORER, pages_of
from tests.explorer.stores import make_store
from tests.explorer.world import World
from tests.serving.http.processes import ROOT
from tools.browser.screenshots import MOST_BYTES, SHOTS, WIDTH, small, taken
from trainer.runs.folder import DAYS_FILE

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


@contextmanager
def shop(folder: Path, world: World) -> Iterator[str]:
    """The whole shop, one day of trainer.daily, and a run that has not written anything yet."""
    own = world.copy(folder / "world")
    shutil.copytree(own.runs / "ids-only", own.runs / "days" / "2026-03-19")
    (own.runs / "days" / DAYS_FILE).write_text("{}")
    (own.runs / "begun").mkdir()
    places = {"store": own.store, "runs": own.runs, "samples": own.samples, "images": own.images, "model": own.model}
    with pages_of(**places) as url:
        yield f"{url}/"


@contextmanager
def export(folder: Path, world: World) -> Iterator[str]:
    """Files without a server, in a folder that was moved."""
    done = ran(*EXPLORER, "export", folder / "pages", *world.options(), cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    yield ((folder / "pages").rename(folder / "moved elsewhere & renamed") / "index.html").as_uri()


@contextmanager
def empty(folder: Path, world: World) -> Iterator[str]:
    """A store without a commit, and folders without anything."""
    make_store(folder / "store")
    places = {name: folder / name for name in ("store", "runs", "samples", "images")}
    for place in places.values():
        place.mkdir(exist_ok=True)
    with pages_of(**places) as url:
        yield f"{url}/"


@contextmanager
def only_store(folder: Path, world: World) -> Iterator[str]:
    """A store whose pictures are away, and nothing else."""
    (folder / "images").mkdir()
    with pages_of(store=world.store, images=folder / "images") as url:
        yield f"{url}/"


@contextmanager
def only_runs(folder: Path, world: World) -> Iterator[str]:
    with pages_of(runs=world.runs) as url:
        yield f"{url}/"


SITES = {each.__name__: each for each in (shop, export, empty, only_store, only_runs)}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in SITES])
def site(request, chromium, world, tmp_path_factory) -> Iterator[Site]:
    """All that a crawl finds, while its pages are there."""
    with SITES[request.param](tmp_path_factory.mktemp(request.param), world) as start:
        found = Site(start)
        try:
            with watched(chromium, start) as page:
                crawl(page, found, *(start.rstrip("/") + path for path in BY_FORMS if request.param == "shop"))
        except AssertionError as error:
            found.problems.append(str(error))
        yield found


def test_every_link_leads_to_a_page_of_this_place_without_a_fault(site, request):
    assert site.problems == []
    if "[shop]" in request.node.name:
        pages = {route.path for route in routes() if "GET" in route.methods}
        pages = {path for path in pages if not path.startswith(NO_PAGES)}
        assert {kind.partition("?")[0] for kind in site.kinds} >= pages


@pytest.mark.parametrize(("width", "dark"), [(NARROW, True), (WIDE, False)], ids=["narrow-dark", "wide-light"])
def test_every_kind_fits_its_window_and_passes_axe(site, watch, width, dark):
    found = []
    with watch(site.start, width=width, dark=dark) as page:
        for url in site.one_of_each:
            page.goto(url)
            settle(page)
            assert page.locator("main").inner_text().strip() != ""
            found += too_wide(page)
            found += violations(page).splitlines()
            for chart in page.locator(".plot").all():
                chart.locator("svg.main-svg").first.wait_for()
                assert chart.get_attribute("aria-label")
    assert found == []


def test_no_column_is_cut_on_a_desk(site, watch):
    found = []
    with watch(site.start, width=DESK) as page:
        for url in site.one_of_each:
            page.goto(url)
            settle(page)
            page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
            found += cut(page)
    assert found == []


def test_the_keyboard_reaches_everything_and_shows_where_it_is(site, watch):
    with watch(site.start) as page:
        for url in site.one_of_each:
            page.goto(url)
            settle(page)
            reached = walk(page)
            assert reached[0]["text"] == "#content", url
            assert [each for each in reached if not each["shown"] or not each["inside"]] == [], url
            links = page.evaluate("[...document.querySelectorAll('nav a')].map(link => link.getAttribute('href'))")
            assert set(links) <= {each["text"] for each in reached}, url


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


def test_pictures_of_the_pages(chromium, explorer):
    """Those whose parts come at once; the shop's runs have the demo's names."""
    shots = [shot for shot in SHOTS if shot.name in ("store", "run")]
    pictures = dict(taken(chromium, explorer.url, shots, "data/demo"))
    assert set(pictures) == {"store", "run"}
    for data in pictures.values():
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.width, image.mode) == ("PNG", WIDTH, "P")
        assert len(data) <= MOST_BYTES
        assert np.asarray(image.convert("RGB")).std() > 10


def test_a_picture_of_noise_gets_fewer_colours():
    noise = np.random.default_rng(0).integers(0, 256, (900, WIDTH, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    fewest = Image.open(io.BytesIO(small(buffer.getvalue())))
    assert len(fewest.getcolors()) <= 16
