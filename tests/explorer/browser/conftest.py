"""Every test below is marked `browser`; where there is no Chromium it says so and is not run."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.explorer.browser.watching.chromium import watched
from tools.browser.chromium import WAY_OUT, find_chromium

FOLDER = Path(__file__).parent
TIMEOUT_S = 600  # of a test here: some visit every page


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker("browser")
            item.add_marker("services")
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The browser, without a window; its profile is gone with each page.

    Its library keeps an event loop running, in which tests elsewhere could run none.
    """
    program = find_chromium()
    if program is None:
        pytest.skip(f"no Chromium: {WAY_OUT}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()


Watched = Callable[..., AbstractContextManager[Page]]
Tab = Callable[..., Page]


@pytest.fixture
def watch(chromium: Browser) -> Watched:
    """Opens pages that fail the test when anything goes wrong in them: `with watch(url, width=375, dark=True)`."""
    return partial(watched, chromium)


@pytest.fixture
def tab(watch: Watched) -> Iterator[Tab]:
    """The same for the length of the test: `page = tab(url)`, which is opened."""
    with ExitStack() as stack:

        def open_tab(url: str, **options) -> Page:
            page = stack.enter_context(watch(url, **options))
            page.goto(url)
            return page

        yield open_tab
