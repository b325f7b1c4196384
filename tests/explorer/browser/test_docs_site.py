"""The site of docs/ as a reader sees it, as files: search finds pages, pictures are seen, nothing asks the network."""

from pathlib import Path

import pytest

from tests.explorer.browser.conftest import Tab
from tools import site

pytestmark = pytest.mark.xdist_group("docs site")  # they share a page that is made once


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "docs-site"
    site.build(site.ROOT, out)
    return out


def test_search_finds_words_and_leads_to_their_section(built: Path, tab: Tab) -> None:
    page = tab((built / "index.html").as_uri())
    page.keyboard.press("/")
    page.keyboard.type("SplitMix64", delay=20)
    page.get_by_text("1. Keys, shards, order").first.click()
    page.wait_for_url("**/FORMAT.html*")
    assert page.get_by_role("heading", name="1. Keys, shards, order").is_visible()


@pytest.mark.parametrize("name", ["index", "WHY", "TROUBLE"])
@pytest.mark.parametrize("dark", [False, True])
def test_pages_fit_a_phone_and_all_their_pictures_are_seen(built: Path, tab: Tab, name: str, dark: bool) -> None:
    page = tab((built / f"{name}.html").as_uri(), width=375, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.evaluate("[...document.images].filter(image => !image.naturalWidth).map(image => image.src)") == []
