"""The explorer as a process, as a thread, and without a server, with its pages as read."""

import itertools
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import uvicorn
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from explorer.html.site import Site
from explorer.places import Places
from explorer.server import application
from tests.serving.http.processes import ServerProcess, ended

EXPLORER = [sys.executable, "-m", "explorer"]


@contextmanager
def serving(folder: Path, *options: object) -> Iterator[ServerProcess]:
    """Run `python -m explorer` with these options on a free port; its log goes below `folder`."""
    with ended(ServerProcess([*EXPLORER, *map(str, options), "--port", "0"], folder)) as server:
        yield server


@contextmanager
def in_thread(app: ASGIApp, **tls: Any) -> Iterator[str]:
    """Serve an application in this process, in a thread; gives its address. Quicker than a process of its own."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", **tls))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"{'https' if tls else 'http'}://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def pages_of(**places: object) -> Iterator[str]:
    """Serve the pages of these places in a thread; gives their address."""
    named = Places(**{name: str(place) for name, place in places.items()})
    named.check()
    with in_thread(application(Site(named))) as url:
        yield url


class Reading(HTMLParser):
    """The words of a page, its elements' names, and the addresses of its links and pictures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words, self.links, self.pictures = list[str](), list[str](), list[str]()
        self.live, self.elements, self._silent = list[str](), list[str](), 0
        self.feed(page)
        self._check_headings()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.elements.append(tag)
        self._silent += tag in ("script", "style")
        if tag == "a":
            self.links.append(given["href"] or "")
        if tag == "img":
            self.pictures.append(given["src"] or "")
        if "hx-get" in given:
            self.live.append(given["hx-get"] or "")
        assert not [name for name in given if name.startswith("on")], given

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.words.append(data)

    def _check_headings(self) -> None:
        """Fail where there is not one h1, or a heading is more than one level below the one before."""
        levels = [int(name[1]) for name in self.elements if name in ("h1", "h2", "h3", "h4")]
        assert levels[:1] == [1], levels
        assert levels.count(1) == 1, levels
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), levels

    @property
    def text(self) -> str:
        """All words, one space between them."""
        return " ".join(" ".join(self.words).split())

    def uris(self) -> list[str]:
        return [unquote_plus(each.partition("uri=")[2]) for each in self.pictures]


def client_of(places: Places, **site: Any) -> TestClient:
    """Make a client of the pages of some places, in this process; in a `with` block, one loop answers all requests."""
    return TestClient(application(Site(places, **site)))


def page(pages: TestClient, address: str, status: int = 200) -> str:
    answer = pages.get(address)
    assert answer.status_code == status, answer.text
    return answer.text


def whole(client: TestClient, address: str, part: str = "") -> str:
    """Ask for a page, and for the part of it that it asks for by itself, until that is there."""
    while waits := re.search(rf'hx-get="([^"]*{part}[^"]*)"', text := client.get(address, params=None).text):
        address = unescape(waits[1])
    return text


class Reader:
    """Asks for the pages of some places."""

    def __init__(self, **places: object) -> None:
        self.client = client_of(Places(**{name: str(place) for name, place in places.items()}))

    def read(self, path: str, status: int = 200, **params: object) -> Reading:
        """Ask for a page, and for each part that it would ask for by itself. Fails for another status."""
        answer = self.client.get(path, params=params or None)
        assert answer.status_code == status, (answer.status_code, Reading(answer.text).text)
        found = Reading(answer.text)
        for part in found.live:
            found = self.read(part)
        return found
