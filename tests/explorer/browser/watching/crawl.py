"""Every link of the site, followed in the browser from the first page on."""

import functools
import re
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urldefrag, urlsplit
from urllib.request import url2pathname

from playwright.sync_api import Page
from starlette.routing import Match, Route

import explorer.html.site
from explorer.places import Places
from explorer.server import application
from tests.explorer.browser.watching.chromium import origin_of

MOST_OPENED, MOST_ASKED = 2, 20
"""Pages of one kind that the browser opens, and further ones of which it asks whether they are there: an impression
with each picture for each of its ads would be thousands."""
DOWNLOADS = (".parquet",)
LINKS = """[...document.querySelectorAll('a[href], area[href]')].map(link => link.href)"""
FRAGMENTS = """[...document.querySelectorAll('a[href^="#"]')].map(link => link.getAttribute('href').slice(1))
    .filter(id => id && !document.getElementById(id))"""
INJECTED = """[...document.querySelectorAll(
    "script:not([src]):not([type='application/json']), img[src='x'], [onclick], [onerror], [onmouseover], "
    + "a[href^='javascript:'], b")].filter(each => each.localName != 'b' || /png|alert/.test(each.textContent))
    .map(each => each.outerHTML)"""
"""Elements that only a name of the shop's can have brought into a page."""


@dataclass
class Site:
    """What a crawl has found: the pages of each kind in the order found, and what is wrong with them."""

    start: str
    kinds: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    problems: list[str] = field(default_factory=list)

    @property
    def one_of_each(self) -> list[str]:
        return [urls[0] for urls in self.kinds.values() if urls]


@functools.cache
def routes() -> list[Route]:
    """List the routes of the explorer with all its places."""
    places = Places(**dict.fromkeys(("store", "runs", "samples", "images", "model"), "."))
    return [route for route in application(explorer.html.site.Site(places)).routes if isinstance(route, Route)]


def kind_of(url: str) -> str:
    """Name the kind of a page: its route, e.g. /images/{key}, and the names of its parameters; of a file, its first
    words. An address that has no route is a kind of its own."""
    parts = urlsplit(url)
    if parts.scheme == "file":  # pages/store-snapshots-5-kind-added-0123456789abcdef.html
        return re.match(r"([a-z]+-?){0,2}", parts.path.rpartition("/")[2])[0]
    names = sorted({name for name, _ in parse_qsl(parts.query, keep_blank_values=True)})
    scope = {"type": "http", "method": "GET", "path": unquote(parts.path)}
    kind = next((route.path for route in routes() if route.matches(scope)[0] == Match.FULL), parts.path)
    return kind + (f"?{'&'.join(names)}" if names else "")


def settle(page: Page) -> None:
    """Wait until what the page asks for after it is shown has come."""
    page.wait_for_load_state("networkidle")


def crawl(page: Page, site: Site, *more: str) -> None:
    """Follow all links from the start, and from `more`, where only forms lead; open MOST_OPENED of each kind."""
    origin, known = origin_of(site.start), {site.start, *more}
    waiting = deque([site.start, *more])
    asked = Counter[str]()
    while waiting:
        url = waiting.popleft()
        kind = kind_of(url)
        if len(site.kinds[kind]) >= MOST_OPENED or url.partition("?")[0].endswith(DOWNLOADS):
            asked[kind] += 1
            is_asked = asked[kind] <= MOST_ASKED or url.startswith("file:")
            site.problems += missing(page, url) if is_asked else []
            continue
        site.kinds[kind].append(url)
        page.goto(url)
        settle(page)
        site.problems += [f"{url}: no element #{name} for a link" for name in page.evaluate(FRAGMENTS)]
        site.problems += [f"{url}: a name became {element}" for element in page.evaluate(INJECTED)]
        for link in page.evaluate(LINKS):
            target = urldefrag(link).url
            if origin_of(target) != origin:
                site.problems.append(f"{url}: a link leaves the server: {link}")
            elif target not in known:
                known.add(target)
                waiting.append(target)


def missing(page: Page, url: str) -> list[str]:
    """Ask whether an address is there, without opening it."""
    if url.startswith("file:"):
        return [] if Path(url2pathname(urlsplit(url).path)).is_file() else [f"no file: {url}"]
    answer = page.context.request.get(url)
    return [] if answer.ok else [f"{answer.status}: {url}"]
