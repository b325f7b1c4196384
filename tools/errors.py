"""The page ERRORS of the site: every error by its sentence, with its classes, from the `Problem` of each package."""

import ast
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from featurestore.errors import Sentences
from tools.tables import table

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("featurestore", "pipeline", "trainer", "serving", "explorer", "crossmedia")
"""Those that have a catalogue PACKAGE/problems.py, but for the benchmarks; jobs use that of the pipeline."""
HEAD = """# Errors

Every error by its sentence. `{where}` stands for the place of a problem (a file, a row, a setting), `{value}` for what
stands there, and other names for what they say. In Python `error.problem` is the name, a member of the `Problem` of
`PACKAGE.problems`, and `error.values` has the values. [TROUBLE](TROUBLE.md) says why, and what to do, where a sentence
does not say enough.
"""


@dataclass(frozen=True)
class Use:
    """A place in a source that tells a problem; `values`: how many it gives, None where that is not written there."""

    line: int
    kind: str
    problem: str
    values: int | None


def uses_in(tree: ast.AST) -> Iterator[Use]:
    """Find the uses of `Problem.NAME` in a source, as `SomeError(Problem.NAME, ...)` and `Problem.NAME.of(...)`."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node, parent in parents.items():
        if not (isinstance(node, ast.Attribute) and ast.unparse(node.value) == "Problem"):
            continue
        is_text = isinstance(parent, ast.Attribute) and parent.attr == "of"
        call = parents[parent] if is_text else parent
        given = call.args[not is_text :] if isinstance(call, ast.Call) else []
        maker = parents[call] if is_text else call
        kind = ast.unparse(maker.func).rpartition(".")[2] if isinstance(maker, ast.Call) else ""
        counted = is_text or (kind.endswith("Error") and isinstance(call, ast.Call) and call.args[:1] == [node])
        starred = any(isinstance(each, ast.Starred) for each in given)
        yield Use(node.lineno, kind, node.attr, len(given) if counted and not starred else None)


def problems_of(package: str) -> type[Sentences]:
    """Return the catalogue of a package."""
    catalogue: type[Sentences] = importlib.import_module(f"{package}.problems").Problem
    return catalogue


def page() -> str:
    """Write the page."""
    text = HEAD
    for package in PACKAGES:
        kinds: dict[str, set[str]] = {}
        for path in (ROOT / package).rglob("*.py"):
            for use in uses_in(ast.parse(path.read_text(encoding="utf-8"))):
                kinds.setdefault(use.problem, set()).add(f"`{use.kind}`" if use.kind.endswith("Error") else "")
        rows = [
            (
                f"`` {each} ``".replace("\n", " "),
                ", ".join(sorted(kinds.get(each.name, set()) - {""})),
                f"`{each.name}`",
            )
            for each in problems_of(package)
        ]
        text += f"\n## {package}\n\n" + table(("sentence", "class", "name"), rows)
    return text
