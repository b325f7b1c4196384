"""Print every file of the project with its purpose in one line, folder by folder.

python tools/tree.py            print the tree
python tools/tree.py --check    print what is wrong; exit 1 where a file does not say what it is for, or a file, a
                                function or a folder has grown too large, or where a docstring's first line is no
                                sentence of its own
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (
    "crossmedia", "featurestore", "pipeline", "trainer", "serving", "explorer", "jobs", "benchmarks", "tools", "tests",
)  # fmt: skip
SUFFIXES = (".py", ".sh", ".yaml", ".txt")
MOST_LINES, MOST_MODULES, MOST_OF_A_FUNCTION = 800, 20, 60
_SENTENCE_ENDS = re.compile(r"(?<!e\.g)\. ")


def listed_files() -> list[Path]:
    """List the tracked files, relative to the root, in the order in which the tree has them."""
    listing = subprocess.run(["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [path for line in listing.splitlines() if (path := Path(line)).suffix in SUFFIXES]
    return sorted(paths, key=lambda path: (FOLDERS.index(path.parts[0]), path.parent, path.name))


def summary_of(path: Path) -> str:
    """Return the first sentence of a file's first line of description, or an empty text."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.suffix == ".py":
        line = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    else:
        line = next((line[2:] for line in text.splitlines() if line.startswith("# ")), "")
    return _SENTENCE_ENDS.split(line, maxsplit=1)[0].rstrip(".")


def unended(source: str) -> list[tuple[int, str]]:
    """List the lines, and names, where the first sentence of a docstring does not end on its first line.

    Looked at are the module, its classes, and the functions and methods whose names do not begin with `_`.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module):
            name = "the file"
        elif isinstance(node, ast.ClassDef) or (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_")
        ):
            name = node.name
        else:
            continue
        line = (ast.get_docstring(node) or ".").partition("\n")[0]
        if not line.endswith((".", "?", ":")):
            found.append((node.body[0].lineno, name))
    return found


def long_functions(source: str) -> list[tuple[int, str, int]]:
    """List the functions and methods over the limit, tests too: line, name, and lines from def to the end."""
    functions = (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    counted = [(node.lineno, node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in functions]
    return [each for each in counted if each[2] > MOST_OF_A_FUNCTION]


def tree(summaries: dict[Path, str]) -> str:
    """Write the tree as text, one line per file."""
    lines: list[str] = []
    width = max(len(path.name) for path in summaries) + 2
    folder = Path()
    for path, summary in summaries.items():
        if path.parent != folder:
            folder = path.parent
            lines.append(f"{folder}/")
        lines.append(f"  {path.name:{width}}{summary}")
    return "\n".join(lines)


def problems(summaries: dict[Path, str]) -> list[str]:
    """List silent files, too large files, folders and functions, and first lines that do not end their sentence."""
    sources = [path for path in summaries if path.suffix == ".py"]
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in sources}
    lines = {path: len(text.splitlines()) for path, text in texts.items()}
    modules = Counter(path.parent for path in sources if path.name != "__init__.py")
    return [
        *(f"{path} needs a first line with its purpose" for path, summary in summaries.items() if not summary),
        *(
            f"{path} has {count} lines: over {MOST_LINES} it has two jobs"
            for path, count in lines.items()
            if count > MOST_LINES
        ),
        *(
            f"{folder}/ has {count} modules side by side: more than {MOST_MODULES} ask for a folder"
            for folder, count in modules.items()
            if count > MOST_MODULES
        ),
        *(
            f"{path}:{line}: {name} has {count} lines: over {MOST_OF_A_FUNCTION} it does more than one thing"
            for path, text in texts.items()
            for line, name, count in long_functions(text)
        ),
        *(
            f"{path}:{line}: the first line of the docstring of {name} does not end its sentence: shorten it"
            for path, text in texts.items()
            if path.parts[0] != "tests"
            for line, name in unended(text)
        ),
    ]


def main() -> int:
    """Print or check the tree and return the exit code."""
    summaries = {path: summary_of(path) for path in listed_files()}
    if "--check" not in sys.argv[1:]:
        print(tree(summaries))
        return 0
    found = problems(summaries)
    sys.stderr.writelines(f"{problem}\n" for problem in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
