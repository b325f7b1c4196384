"""Tests of the pages as a folder: every link leads to a file of it, and an export is whole or not there."""

import re
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from explorer.errors import ExplorerError
from explorer.html.links import LEFT_OUT
from explorer.places import Places
from explorer.server.export import export
from tests.explorer.world import World

_LINK = re.compile(r'(?:href|src|action)="([^"]*)"')


def _places(world: World) -> Places:
    return Places(store=str(world.store), runs=str(world.runs), samples=str(world.samples), images=str(world.images))


def _broken(folder: Path) -> list[str]:
    """List the links of all pages that lead to no file of the folder."""
    broken = []
    for page in folder.rglob("*.html"):
        for link in map(unescape, _LINK.findall(page.read_text())):
            parts = urlsplit(link)
            if link.startswith(("#", "data:")):
                continue
            target = (page.parent / unquote(parts.path)).resolve()
            if parts.scheme or parts.query or not target.is_file() or not target.is_relative_to(folder.resolve()):
                broken.append(f"{page.relative_to(folder)}: {link}")
    return broken


def _silent(done: int, known: int) -> None:
    pass


def test_every_link_leads_to_a_file(world: World, tmp_path: Path) -> None:
    exported = export(_places(world), tmp_path / "pages", 400, _silent)
    assert exported.errors == []
    assert (tmp_path / "pages/index.html").is_file()
    files = [each for each in (tmp_path / "pages").rglob("*") if each.is_file()]
    assert exported.num_files == len(files) <= 400
    assert exported.num_bytes == sum(each.stat().st_size for each in files)
    assert _broken(tmp_path / "pages") == []


def test_beyond_the_limit_links_lead_to_a_page_that_says_so(world: World, tmp_path: Path) -> None:
    exported = export(_places(world), tmp_path / "pages", 10, _silent)
    assert exported.num_files == 10
    assert exported.num_left_out > 10
    assert _broken(tmp_path / "pages") == []
    assert any(LEFT_OUT in page.read_text() for page in (tmp_path / "pages").rglob("*.html"))
    assert "at most 10 files" in (tmp_path / "pages" / LEFT_OUT).read_text()


def test_nothing_asks_a_server(world: World, tmp_path: Path) -> None:
    export(_places(world), tmp_path / "pages", 200, _silent)
    for page in (tmp_path / "pages").rglob("*.html"):
        text = page.read_text()
        assert "<form" not in text and "hx-" not in text and "htmx" not in text, page


def test_an_export_replaces_an_export_and_nothing_else(shop: World, tmp_path: Path) -> None:
    out = tmp_path / "pages"
    places = Places(images=str(shop.images))
    export(places, out, 10, _silent)
    (out / "old.html").write_text("old")
    export(places, out, 10, _silent)
    assert not (out / "old.html").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(ExplorerError, match="something else"):
        export(places, other, 10, _silent)
    assert (other / "mine.txt").read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []


def test_an_export_that_fails_leaves_the_earlier_one(
    shop: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pages"
    export(Places(images=str(shop.images)), out, 10, _silent)
    before = (out / "index.html").read_text()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("explorer.server.export._write", full)
    with pytest.raises(ExplorerError, match="No space left"):
        export(Places(images=str(shop.images)), out, 10, _silent)
    assert (out / "index.html").read_text() == before
    assert [each.name for each in tmp_path.iterdir()] == ["pages"]
