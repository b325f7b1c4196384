"""Writes the README's tree: one line per file, the first line of its docstring, between the two markers.

python tools/tree.py            rewrite README.md
python tools/tree.py --check    exit 1 when README.md does not show the tree as it is
"""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
START, END = "<!-- tree -->\n", "<!-- end of tree -->\n"
FOLDERS = ("featurestore", "pipeline", "trainer", "jobs", "benchmarks", "tools", "tests")
SUFFIXES = (".py", ".sh", ".yaml", ".txt")


def listed_files() -> list[Path]:
    """Tracked files, relative to the root. Ends the run when one does not say what it is for."""
    listing = subprocess.run(["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [path for line in listing.splitlines() if (path := Path(line)).suffix in SUFFIXES]
    silent = [str(path) for path in paths if not summary_of(path)]
    if silent:
        sys.exit(f"these files need a first line that says what they are for: {', '.join(silent)}")
    return paths


def summary_of(path: Path) -> str:
    """The first sentence of the first line that the file says about itself."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.suffix == ".py":
        line = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    else:
        line = next((line[2:] for line in text.splitlines() if line.startswith("# ")), "")
    return line.partition(". ")[0].rstrip(".")


def tree() -> str:
    """The tree as a text block, folder by folder."""
    lines: list[str] = []
    folder = Path()
    width = max(len(path.name) for path in listed_files()) + 2
    for path in sorted(listed_files(), key=lambda path: (FOLDERS.index(path.parts[0]), path.parent, path.name)):
        if path.parent != folder:
            folder = path.parent
            lines.append(f"{folder}/")
        lines.append(f"  {path.name:{width}}{summary_of(path)}")
    return "\n".join(["```", *lines, "```", ""])


def main() -> int:
    """Rewrites or checks the README; the exit code."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    wanted = before + START + tree() + END + after
    if text == wanted:
        return 0
    if "--check" in sys.argv[1:]:
        print("README.md does not show the tree as it is: run python tools/tree.py", file=sys.stderr)
        return 1
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
