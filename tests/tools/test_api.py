"""The page of the Python API: every public name with its signature and what its docstring says."""

import re
from pathlib import Path

import griffe
import pytest

import crossmedia
import featurestore
from tools import api

SOURCE = '''
class Shelf:
    """Holds things.

    In any order."""

    width: int
    """In cm."""
    _hidden = 1

    def put(self, *things: str, at: int = 0, **more: float) -> None:
        """Put things on it."""

    def take(self, count: int, /, first: bool = True, *, by: str = "hand") -> list[str]:
        """Take some. Raises KeyError."""

    def silent(self) -> None: ...

    def _own(self) -> None:
        """Not for others."""


def connect(address: str) -> Shelf:
    """Find one."""
'''


@pytest.fixture
def page(tmp_path: Path) -> str:
    (tmp_path / "shelves.py").write_text(SOURCE)
    module = griffe.GriffeLoader(search_paths=[tmp_path], allow_inspection=False).load("shelves")
    return "\n".join(line for name in ("Shelf", "connect") for line in api.section(f"shelves.{name}", module[name]))


def test_signatures_are_those_of_the_source(page: str) -> None:
    assert "Shelf.put(*things: str, at: int = 0, **more: float) -> None" in page
    assert "Shelf.take(count: int, /, first: bool = True, *, by: str = 'hand') -> list[str]" in page
    assert "connect(address: str) -> Shelf" in page


def test_docstrings_are_there_and_what_is_private_is_not(page: str) -> None:
    assert "Holds things.\n\nIn any order." in page and "| `width` | In cm. |" in page
    assert "from shelves import connect" in page
    assert "_hidden" not in page and "_own" not in page and "silent" not in page


def test_every_public_name_of_the_store_is_on_the_page() -> None:
    named = {name for names in api.NAMES.values() for name in names}
    for package in (crossmedia, featurestore):
        assert {f"{package.__name__}.{name}" for name in package.__all__} <= named
    text = api.page()
    titles = re.findall(r"^### `(\w+)`", text, re.MULTILINE)
    assert titles == [name.rpartition(".")[2] for names in api.NAMES.values() for name in names]
