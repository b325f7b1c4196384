"""The tests' own eyes: each kind of fault in a page fails the test that opened it, and a good page does not."""

import re
from collections.abc import Iterator
from urllib.parse import urlencode

import pytest
from starlette.applications import Starlette
from starlette.responses import HTMLResponse
from starlette.routing import Route

from tests.explorer.browser.watching.chromium import NARROW, too_wide, violations
from tests.explorer.serving import in_thread

GOOD = """<!doctype html><html lang="en"><head><title>Good</title><link rel="icon" href="data:,"></head>
<body><main><h1>Good</h1><p>Nothing to see</p></main></body></html>"""
FAULTS = {
    "<script>console.error('bad')</script>": "console: bad",
    "<script>undefinedFunction()</script>": "script: undefinedFunction is not defined",
    "<script>alert(1)</script>": "dialog: 1",
    "<img alt='' src='/missing.png'>": "404: ",
    "<img alt='' src='http://127.0.0.1:1/other.png'>": "request to another host: http://127.0.0.1:1/other.png",
}
UNREADABLE = """<p style='color: #ccc; background: #fff'>hardly to be read</p>
<img src='data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7'>"""


@pytest.fixture(scope="module")
def tiny() -> Iterator[str]:
    """A server of one page, whose body is what is asked for."""

    async def page(request):
        return HTMLResponse(GOOD.replace("</main>", request.query_params.get("body", "") + "</main>"))

    with in_thread(Starlette(routes=[Route("/", page)])) as url:
        yield f"{url}/"


def test_a_good_page_is_good(tiny, tab):
    page = tab(tiny, width=NARROW)
    assert too_wide(page) == []
    assert violations(page) == ""


@pytest.mark.parametrize(("body", "problem"), FAULTS.items())
def test_a_fault_fails_the_test(tiny, watch, body, problem):
    with pytest.raises(AssertionError, match=re.escape(problem)), watch(tiny) as page:
        page.goto(f"{tiny}?{urlencode({'body': body})}", wait_until="networkidle")


def test_what_people_cannot_see_or_scroll_is_found(tiny, watch):
    with watch(tiny, width=NARROW) as page:
        page.goto(f"{tiny}?{urlencode({'body': UNREADABLE})}")
        found = violations(page)
        assert "color-contrast: p" in found
        assert "image-alt: img" in found
        page.goto(f"{tiny}?{urlencode({'body': '<div style=width:500px>wide</div>'})}")
        assert "<div style=" in too_wide(page)[0]
