"""The catalogues of problems: each is told, with as many values as it names, and no error has words of its own."""

import ast
import re
from pathlib import Path

import pytest

from featurestore import errors
from tools.errors import PACKAGES, page, problems_of, uses_in

ROOT = Path(__file__).parents[2]
SOURCES = {
    path: ast.parse(path.read_text())
    for part in (*PACKAGES, "jobs")
    for path in sorted((ROOT / part).rglob("*.py"))
    if path.name != "problems.py"
}


def errors_of_ours() -> set[str]:
    """Name the classes of errors that end a command with one line."""
    bases = {
        node.name: {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        for tree in SOURCES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {errors.UserError.__name__}
    while more := {name for name, those in bases.items() if those & found} - found:
        found |= more
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_each_problem_is_told_with_as_many_values_as_its_sentence_names(package: str) -> None:
    catalogue, told = problems_of(package), set()
    for path, tree in SOURCES.items():
        if f"from {package}.problems import Problem" not in (text := path.read_text()):
            continue
        for made in re.findall(r'Problem\[f"([A-Z_]+)\{', text):
            told |= {name for name in catalogue.__members__ if name.startswith(made)}
        for use in uses_in(tree):
            told.add(use.problem)
            wanted = len(catalogue[use.problem].names)
            assert use.values in (None, wanted), f"{path}:{use.line}: {use.problem} tells {wanted}, not {use.values}"
    assert told == set(catalogue.__members__)
    assert [*catalogue.__members__] == sorted(catalogue.__members__)
    assert len(set(catalogue)) == len(catalogue.__members__)


def test_no_error_of_ours_is_made_of_a_sentence_that_is_not_in_a_catalogue() -> None:
    kinds = errors_of_ours()
    assert len(kinds) > 50
    loose = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in kinds
        for words in node.args[:1]
        if isinstance(words, ast.JoinedStr | ast.BinOp) or isinstance(getattr(words, "value", None), str)
    ]
    assert loose == []


def test_the_page_has_each_sentence_with_the_class_of_its_error() -> None:
    rows = [row for row in page().splitlines() if row.startswith("| ``")]
    assert len(rows) == sum(len(problems_of(package)) for package in PACKAGES)
    assert any("`PinError`" in row for row in rows)
