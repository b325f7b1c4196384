"""The exported folder, opened as files: no server, all links, nothing asked of the network."""

import re

import pytest

from tests.explorer.browser.watching.chromium import NARROW, WIDE, too_wide, violations, watched
from tests.explorer.browser.watching.crawl import Site, crawl, settle
from tests.explorer.serving import exported


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "pages"
    exported(world, out, "--model", world.model)
    moved = out.with_name("moved elsewhere & renamed")
    out.rename(moved)
    return moved


@pytest.fixture(scope="module")
def start(folder):
    return (folder / "index.html").as_uri()


@pytest.fixture(scope="module")
def site(chromium, start) -> Site:
    found = Site()
    try:
        with watched(chromium, start) as page:
            found = crawl(page, start)
    except AssertionError as error:
        found.problems.append(str(error))
    return found


def test_every_link_works_without_a_server(site, folder):
    assert site.problems == []
    assert len(site.kinds) >= 1


@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_exported_pages_fit_and_pass_axe(site, start, watch, width):
    found = []
    with watch(start, width=width) as page:
        for url in site.one_of_each:
            page.goto(url)
            settle(page)
            found += too_wide(page)
            found += violations(page).splitlines()
            assert page.locator("form, [hx-get], [hx-post]").count() == 0, url
    assert found == []


def test_the_files_have_plain_names_and_no_place_of_this_machine(folder, world):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert all(re.fullmatch(r"[A-Za-z0-9./-]+", str(path.relative_to(folder))) for path in files)
    assert all(path.resolve().is_relative_to(folder.resolve()) for path in files)
