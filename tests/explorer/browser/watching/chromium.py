"""Chromium: pages of it that note everything that goes wrong, and axe-core on them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Dialog, Page, Request, Response

WIDE, DESK, NARROW = 1400, 1280, 375
HEIGHT = 900
PAGE_TIMEOUT_MS = 30_000
WITHOUT_SERVER = ("data:", "blob:", "about:")
TOO_WIDE = """() => {
    const root = document.documentElement, more = root.scrollWidth - root.clientWidth;
    if (more <= 0) return [];
    const scrolls = at => at && (getComputedStyle(at).overflowX !== 'visible' || scrolls(at.parentElement));
    const isOut = each => each.getBoundingClientRect().left + Math.max(each.scrollWidth, each.offsetWidth || 0)
        > root.clientWidth && !scrolls(each);
    const out = [...document.body.querySelectorAll('main *, header *, footer *')].filter(isOut).slice(0, 3);
    return [`${location}: ${more} px too wide: ${out.map(each => each.outerHTML.slice(0, 100)).join(' | ')}`];
}"""
CUT = """() => [...document.querySelectorAll('main .scroll')].filter(each => each.scrollWidth > each.clientWidth + 1)
    .map(each => `${location}: ${each.getAttribute('aria-label')}: ${each.scrollWidth} of ${each.clientWidth} px`)"""
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


@dataclass
class Seen:
    """What went wrong in a page: errors and warnings of its console and scripts, requests that failed or left the
    server, and dialogs. `asked` has the addresses that it asked for."""

    origin: str
    """Scheme, host and port of the one server that may be asked; file:// where there is none."""
    problems: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    expected_status: set[int] = field(default_factory=set)
    """Of answers that the test wants, e.g. 404."""

    def watch(self, page: Page) -> None:
        """Note from now on what happens in `page`."""
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.problems.append(f"script: {error}"))
        page.on("dialog", self._dialog)
        page.on("request", self._request)
        page.on("requestfailed", self._failed)
        page.on("response", self._response)

    def _console(self, message: ConsoleMessage) -> None:
        is_expected = any(f"status of {status}" in message.text for status in self.expected_status)
        if message.type in ("error", "warning", "assert") and not is_expected:
            self.problems.append(f"console: {message.text} ({message.location.get('url')})")

    def _dialog(self, dialog: Dialog) -> None:
        self.problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _request(self, request: Request) -> None:
        self.asked.append(request.url)
        if not request.url.startswith(WITHOUT_SERVER) and origin_of(request.url) != self.origin:
            self.problems.append(f"request to another host: {request.url}")

    def _failed(self, request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # left behind, as another page was opened
            self.problems.append(f"failed: {request.url}: {request.failure}")

    def _response(self, response: Response) -> None:
        if response.status >= 400 and response.status not in self.expected_status:
            self.problems.append(f"{response.status}: {response.url}")


@contextmanager
def watched(browser: Browser, url: str, *, width: int = WIDE, dark: bool = False, **options) -> Iterator[Page]:
    """Open a page of a fresh profile for the server at `url`; fail at the end if anything went wrong in it.

    `page.seen` has what did; `options` are those of playwright's `new_context`.
    """
    context: BrowserContext = browser.new_context(
        viewport={"width": width, "height": HEIGHT}, color_scheme="dark" if dark else "light", **options
    )
    try:
        context.set_default_timeout(PAGE_TIMEOUT_MS)
        page = context.new_page()
        page.seen = Seen(origin_of(url))
        page.seen.watch(page)
        yield page
    finally:
        context.close()
    if page.seen.problems:
        raise AssertionError("\n".join(page.seen.problems))


def origin_of(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def violations(page: Page) -> str:
    """Run axe-core on the page as it is: one line for each element that a rule refuses; empty where none does."""
    found = Axe().run(page, options={"resultTypes": ["violations"], "runOnly": RULES, "preload": False})
    return "\n".join(
        f"{page.url}: {rule['id']}: {' '.join(map(str, node['target']))}: {node['html'][:160]}: "
        f"{'; '.join(each['message'] for each in (*node['any'], *node['all'], *node['none']))}"
        for rule in found.response["violations"]
        for node in rule["nodes"]
    )


def cut(page: Page) -> list[str]:
    """Name the tables whose last columns are outside of the window; empty where all columns are seen."""
    return page.evaluate(CUT)


def too_wide(page: Page) -> list[str]:
    """Tell by how much the page is wider than its window, and what sticks out; empty where it fits."""
    return page.evaluate(TOO_WIDE)
