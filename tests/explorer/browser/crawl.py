"""Every link of the site, followed in the browser from the first page on."""

import re
from collections import defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, urldefrag, urlsplit
from urllib.request import url2pathname

from playwright.sync_api import Page

from tests.explorer.browser.chromium import origin_of

MOST_OF_A_KIND = 6
"""Pages of one kind that the browser opens; of the others it is asked whether they are there."""
LINKS = """[...document.querySelectorAll('a[href], area[href]')].map(link => link.href)"""
FRAGMENTS = """[...document.querySelectorAll('a[href^="#"]')].map(link => link.getAttribute('href').slice(1))
    .filter(id => id && !document.getElementById(id))"""


@dataclass
class Site:
    """What a crawl has found: the pages of each kind in the order found, and what is wrong with links."""

    kinds: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    problems: list[str] = field(default_factory=list)

    @property
    def one_of_each(self) -> list[str]:
        """A page of each kind."""
        return [urls[0] for urls in self.kinds.values()]


def kind_of(url: str) -> str:
    """Name the kind of a page: its path, with a star for a number or a name, and the names of its parameters."""
    parts = urlsplit(url)
    if parts.scheme == "file":  # pages/image-uri-shoes-shoe-00-jpg-0123456789abcdef.html
        return re.split(r"[-.]", parts.path.rpartition("/")[2])[0]
    head, *rest = parts.path.strip("/").split("/")
    path = "/".join([head, *("*" for _ in rest)])
    names = sorted({name for name, _ in parse_qsl(parts.query, keep_blank_values=True)})
    return f"/{path}" + (f"?{'&'.join(names)}" if names else "")


def crawl(page: Page, start: str) -> Site:
    """Follow all links from `start`; answers that are no pages, as pictures, are asked for and not opened."""
    site, origin = Site(), origin_of(start)
    waiting, known = deque([start]), {start}
    while waiting:
        url = waiting.popleft()
        same = site.kinds[kind_of(url)]
        if len(same) >= MOST_OF_A_KIND:
            site.problems += missing(page, url)
            continue
        same.append(url)
        page.goto(url)
        site.problems += [f"{url}: no element #{name} for a link" for name in page.evaluate(FRAGMENTS)]
        for link in page.evaluate(LINKS):
            target = urldefrag(link).url
            if origin_of(target) != origin:
                site.problems.append(f"{url}: a link leaves the server: {link}")
            elif target not in known:
                known.add(target)
                waiting.append(target)
    return site


def missing(page: Page, url: str) -> list[str]:
    """Ask whether an address is there, without opening it."""
    if url.startswith("file:"):
        return [] if Path(url2pathname(urlsplit(url).path)).is_file() else [f"no file: {url}"]
    answer = page.context.request.get(url)
    return [] if answer.ok else [f"{answer.status}: {url}"]
