"""Tests of the pages as a folder: every link leads to a file of it, and an export is whole or not there."""

import os
import re
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from explorer.errors import ExplorerError
from explorer.export import ExportedPages, export
from explorer.html.site import LEFT_OUT
from explorer.places import Places
from explorer.problems import Problem
from tests.explorer.world import HOSTILE, World
from tests.faulty import full_from
from tests.raised import raises

_LINK = re.compile(r'(?:href|src|action)="([^"]*)"')


def _exported(places: Places, folder: Path, most_files: int = 10) -> ExportedPages:
    return export(places, folder, most_files, lambda done, known: None)


def _broken(folder: Path) -> list[str]:
    """List the links of all pages that lead to no file of the folder."""
    broken, whole = [], folder.resolve()
    files = {each.resolve() for each in whole.rglob("*") if each.is_file()}
    for page in whole.rglob("*.html"):
        for link in map(unescape, _LINK.findall(page.read_text())):
            parts = urlsplit(link)
            if link.startswith(("#", "data:")):
                continue
            target = Path(os.path.normpath(page.parent / unquote(parts.path)))
            if parts.scheme or parts.query or target not in files:
                broken.append(f"{page.relative_to(whole)}: {link}")
    return broken


@pytest.fixture(scope="module")
def exported_world(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportedPages, Path]:
    """The whole shop with its runs, up to a limit: what was done, and the folder. Made once, in ten seconds."""
    folder = tmp_path_factory.mktemp("world") / "pages"
    return _exported(world.places(model=world.model), folder, 250), folder


def _pages_of(folder: Path, kind: str = "") -> list[str]:
    return [page.read_text() for page in (folder / "pages").glob(f"{kind}*.html")]


def test_every_link_leads_to_a_file(exported_world: tuple[ExportedPages, Path]) -> None:
    exported, folder = exported_world
    assert exported.errors == []
    assert (folder / "index.html").is_file()
    files = [each for each in folder.rglob("*") if each.is_file()]
    assert exported.num_files == len(files) <= 250
    assert exported.num_bytes == sum(each.stat().st_size for each in files)
    assert _broken(folder) == []


def test_beyond_the_limit_links_lead_to_a_page_that_says_so(world: World, tmp_path: Path) -> None:
    exported = _exported(world.places(model=world.model), tmp_path / "pages")
    assert exported.num_files == 10
    assert exported.num_left_out > 10
    assert _broken(tmp_path / "pages") == []
    assert any(LEFT_OUT in page.read_text() for page in (tmp_path / "pages").rglob("*.html"))
    assert "at most 10 files" in (tmp_path / "pages" / LEFT_OUT).read_text()


def test_pages_need_no_server(exported_world: tuple[ExportedPages, Path], shop: World, tmp_path: Path) -> None:
    only_shop = _exported(shop.places(runs=None, samples=None), tmp_path / "pages", 200), tmp_path / "pages"
    for exported, folder in (exported_world, only_shop):
        assert exported.errors == []
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert all(re.fullmatch(r"[A-Za-z0-9./-]+", str(path.relative_to(folder))) for path in files)
        for page in folder.rglob("*.html"):
            text = page.read_text()
            assert "<form" not in text and "hx-" not in text and "htmx" not in text, page
            assert not [name for name in HOSTILE if "<" in name and name in text] and "\u202e" not in text, page
    shown = _pages_of(only_shop[1])
    assert "exactly, among all 28 images" in "".join(shown)
    assert any("28</a>" in page or "28 added" in page for page in shown)
    groups = _pages_of(exported_world[1], "impressions-both-")
    assert len(groups) >= 12 - 6
    assert all("Why this ad got this score" in text for text in groups)
    lists = _pages_of(exported_world[1], "impressions-")
    first = next(text for text in lists if "impressions scored by run" in text)
    assert first.count("Why ") == 12
    assert "This copy of the pages has the first 12;" in first
    (model,) = _pages_of(exported_world[1], "model-")
    assert "Version 1 is in use" in model
    (worth,) = _pages_of(exported_world[1], "worth-")
    assert "Measured now on" in worth


def test_an_export_replaces_an_export_whole_and_nothing_else(shop: World, tmp_path: Path) -> None:
    out, other, places = tmp_path / "pages", tmp_path / "other", Places(images=str(shop.images))
    _exported(places, out)
    (out / "old.html").write_text("old")
    _exported(places, out)
    assert not (out / "old.html").exists()
    before = (out / "index.html").read_text()
    with full_from(1_000), raises(ExplorerError, Problem.CANNOT_WRITE, where=out, reason="File too large"):
        _exported(places, out)
    assert (out / "index.html").read_text() == before
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with raises(ExplorerError, Problem.NOT_EXPORT, where=other):
        _exported(places, other)
    assert (other / "mine.txt").read_text() == "mine"
    assert {each.name for each in tmp_path.iterdir()} == {"pages", "other"}
