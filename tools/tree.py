"""Print every file of the project with the line that says what it is for, folder by folder.

python tools/tree.py            print the tree
python tools/tree.py --check    print nothing; exit 1 where a file does not say what it is for
"""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("featurestore", "pipeline", "trainer", "jobs", "benchmarks", "tools", "tests")
SUFFIXES = (".py", ".sh", ".yaml", ".txt")


def listed_files() -> list[Path]:
    """List the tracked files, relative to the root, in the order in which the tree has them."""
    listing = subprocess.run(["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [path for line in listing.splitlines() if (path := Path(line)).suffix in SUFFIXES]
    return sorted(paths, key=lambda path: (FOLDERS.index(path.parts[0]), path.parent, path.name))


def summary_of(path: Path) -> str:
    """Return the first sentence of the first line that the file says about itself; empty where it says nothing."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.suffix == ".py":
        line = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    else:
        line = next((line[2:] for line in text.splitlines() if line.startswith("# ")), "")
    return line.partition(". ")[0].rstrip(".")


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


def main() -> int:
    """Print or check the tree and return the exit code."""
    summaries = {path: summary_of(path) for path in listed_files()}
    silent = [str(path) for path, summary in summaries.items() if not summary]
    if silent:
        print(f"these files need a first line that says what they are for: {', '.join(silent)}", file=sys.stderr)
        return 1
    if "--check" not in sys.argv[1:]:
        print(tree(summaries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
