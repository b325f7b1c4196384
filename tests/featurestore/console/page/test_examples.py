"""The pages in docs/examples: small, complete, of no machine in particular, linked from the docs of their commands."""

import re
from pathlib import Path

import pytest

from tests.pages import check_page

ROOT = Path(__file__).parents[4]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.html"))
LINKED_FROM = {
    "evaluate.html": "EVALUATION.md",
    "experiments.html": "RESULTS.md",
    "plan.html": "PLAN.md",
    "benchmark.html": "PERFORMANCE.md",
    "verify.html": "OPERATIONS.md",
    "extract_features.html": "GUIDE.md",
}


def test_each_kind_of_page_has_one_and_together_they_are_small() -> None:
    assert {path.name for path in EXAMPLES} == set(LINKED_FROM)
    assert sum(path.stat().st_size for path in EXAMPLES) < 400_000


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_a_whole_page_without_paths_of_a_machine(path: Path) -> None:
    page = check_page(path.read_text(encoding="utf-8"))
    assert not re.search(r"/(tmp|root|home|work|usr|var|mnt)/", page.text)
    assert page.plots and f"--html docs/examples/{path.name}" in page.text
    (command,) = (text for text in page.texts if text.startswith("python "))
    docs = ROOT / "docs"
    assert f"| [{path.name}](examples/{path.name}) | `{command}` |" in (docs / "PAGES.md").read_text(encoding="utf-8")
    assert f"(examples/{path.name})" in (docs / LINKED_FROM[path.name]).read_text(encoding="utf-8")
