"""The listing of all files: what it prints of each, and what its check refuses."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tools import tree

Checked = Callable[..., tuple[int, list[str]]]
SHELF = "trainer/shelf.py"
GOOD = '''
"""Shelves. Made of wood.

And of steel."""


class Shelf:
    """Holds things:

    in any order."""

    def put(self) -> None:
        """Put a thing on it.

        Where there is space."""

    def silent(self) -> None: ...

    def _own(self) -> None:
        """What only this class calls may be described
        as it comes."""
'''


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Checked:
    """What the check says to a repository whose files, one or more, have this text."""
    monkeypatch.setattr("sys.argv", ["tree.py", "--check"])
    monkeypatch.setattr(tree, "ROOT", tmp_path)

    def check(text: str, *names: str) -> tuple[int, list[str]]:
        paths = [Path(name) for name in names or [SHELF]]
        for path in paths:
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text(text, encoding="utf-8")
        monkeypatch.setattr(tree, "listed_files", lambda: paths)
        return tree.main(), capsys.readouterr().err.splitlines()

    return check


def test_first_lines_that_end_their_sentence_pass_and_a_file_needs_one(checked: Checked) -> None:
    assert checked(GOOD) == (0, [])
    assert checked("width_cm = 40\n") == (1, [f"{SHELF} needs a first line with its purpose"])


@pytest.mark.parametrize(
    ("good", "bad", "name"),
    [
        ("Shelves. Made of wood.\n\nAnd", "Shelves, made of wood,\nand", "the file"),
        ("Holds things:\n\n    in", "Holds things\n    in", "Shelf"),
        ("Put a thing on it.\n\n        Where", "Put a thing on it\n        where", "put"),
    ],
)
def test_a_first_line_that_needs_the_second_is_refused(checked: Checked, good: str, bad: str, name: str) -> None:
    assert good in GOOD
    line = GOOD[: GOOD.index(good)].count("\n") + 1
    says = f"{SHELF}:{line}: the first line of the docstring of {name} does not end its sentence: shorten it"
    assert checked(GOOD.replace(good, bad)) == (1, [says])


METHOD = '"""Shelves."""\n\n\nclass Shelf:\n    """Holds things."""\n\n    async def put(self):\n'


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        (METHOD + 59 * "        ...\n", "        ...\n", "trainer/shelf.py:7: put has 61 lines: over 60 it does more"),
        ('"""Shelves."""\n' + 799 * "\n", "\n", "trainer/shelf.py has 801 lines: over 800 it has two jobs"),
    ],
)
def test_what_has_grown_beyond_a_limit_is_refused(checked: Checked, text: str, line: str, says: str) -> None:
    assert checked(text) == (0, [])
    code, (said,) = checked(text + line)
    assert code == 1 and said.startswith(says)


def test_a_21st_module_side_by_side_is_refused(checked: Checked) -> None:
    names = [f"tests/shelf_{number}.py" for number in range(21)]
    assert checked('"""Shelves."""\n', *names[1:]) == (0, [])
    says = "tests/ has 21 modules side by side: more than 20 ask for a folder"
    assert checked('"""Shelves."""\n', *names) == (1, [says])


@pytest.mark.parametrize("mark", ["cluster", "browser"])
def test_the_makefile_looks_where_such_tests_are(mark: str) -> None:
    makefile = (tree.ROOT / "Makefile").read_text()
    (folders,) = re.findall(rf"^{mark.upper()}_TESTS := (.*)$", makefile, re.MULTILINE)
    marked = re.compile(rf"""mark\.{mark}\b|add_marker\("{mark}"\)""")
    paths = [path for path in (tree.ROOT / "tests").rglob("*.py") if marked.search(path.read_text())]
    found = [path.relative_to(tree.ROOT) for path in paths]
    assert found and not [path for path in found if not any(path.is_relative_to(each) for each in folders.split())]
