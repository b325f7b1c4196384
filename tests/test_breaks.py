"""The runner of planted faults: a package with one that its tests notice, one that they do not, and one of no use."""

import subprocess
from pathlib import Path

import pytest

from tests.breaks import Break, Checkout, Result, read_breaks, run_all, table

SHELF = "def fits(books: int) -> bool:\n    return 0 <= books <= 10\n"
TESTS = """
from shop.shelf import fits

class TestShelf:
    def test_many(self) -> None:
        assert fits(10) and not fits(11)

def test_that_fails_anyway() -> None:
    assert not fits(3)
"""
FAULTS = """
[[shop]]
old = "books <= 10"
new = "books <= 11"
harm = "a shelf breaks"
tests = ["test_many"]

[[shop]]
old = "0 <="
new = "-1 <="
harm = "there may be less than no books"
tests = ["test_shelf.py::TestShelf::test_many"]

[[shop]]
old = "return"
new = "return not"
harm = "shelves break"
tests = ["test_that_fails_anyway"]
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    files = {"shop/shelf.py": SHELF, "tests/shop/test_shelf.py": TESTS, "faults.toml": FAULTS}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def faults_of(root: Path) -> list[Break]:
    return read_breaks(root / "faults.toml")


@pytest.mark.long
def test_what_is_noticed_what_is_not_and_what_says_nothing(root: Path) -> None:
    lines: list[str] = []
    found = run_all(root, faults_of(root), lines.append)
    failing = "tests/shop/test_shelf.py::test_that_fails_anyway"
    assert [(each.status, each.by) for each in found] == [
        ("noticed", "tests/shop/test_shelf.py::TestShelf::test_many"),
        ("GAP", ""),
        ("unsound", f"without the fault: {failing}"),
    ]
    assert lines[0].startswith("2 tests without a fault: 1 fail")
    assert len(lines) == 4
    assert (root / "shop/shelf.py").read_text() == SHELF


def test_the_table_has_a_line_for_each_and_what_has_moved_is_found(root: Path) -> None:
    faults = faults_of(root)[:2]
    results = [
        Result(number=1, status="noticed", by="tests/shop/test_shelf.py::TestShelf::test_many", seconds=1.25),
        Result(number=2, status="GAP", by="", seconds=30),
    ]
    assert table(faults, results).splitlines() == [
        "   package  what a user would suffer         noticed by  s",
        "1  shop     a shelf breaks                   test_many   1.2",
        "2  shop     there may be less than no books  GAP         30.0",
        "1 of 2 noticed",
    ]
    assert Checkout(root).problems(faults_of(root)) == []
    (root / "shop/shelf.py").rename(root / "shop/furniture.py")
    (root / "tests/shop/test_shelf.py").rename(root / "tests/shop/test_furniture.py")
    problem = "2: test_shelf.py::TestShelf::test_many means no test"
    assert Checkout(root).problems(faults_of(root)) == [problem]
    (root / "shop/door.py").write_text("return")
    assert Checkout(root).problems(faults_of(root)) == [
        problem,
        "3: shop has 2 times (shop/door.py, shop/furniture.py): return",
    ]
