"""Build the pages of docs/ as a site with search that needs no server and no network.

python -m tools.site                 write data/docs-site; open data/docs-site/index.html
python -m tools.site --out FOLDER    write it elsewhere

README.md is the first page. The pages COMMANDS, API and ERRORS are written from the sources, and are in the site alone.
A link to a file of the repository leads to a copy of that file; tests/tools/test_pages.py checks all links. Problems
are printed, the exit code is 1, and the previous site stays: a page that the navigation (docs/zensical.toml) lacks, or
a missing page in it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tools import api, commands, errors

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = "docs/zensical.toml"
NAMES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
"""Pages outside of docs/, and their names in the site."""
WRITTEN: dict[str, Callable[[], str]] = {
    "docs/COMMANDS.md": commands.page,
    "docs/API.md": api.page,
    "docs/ERRORS.md": errors.page,
}
"""Pages that exist only in the site, and the functions that write them."""
FILES = "files"
"""The folder of the site that has copies of the repository's files."""
MARKDOWN = MarkdownIt("commonmark").enable("table")


class SiteError(Exception):
    """The site cannot be built; each line of the message is one problem."""


def pages_of(root: Path) -> dict[str, str]:
    """Name the pages: their path in the repository to their path in the site."""
    docs = root / "docs"
    below = sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))
    return NAMES | {f"docs/{name}": name for name in below} | {page: Path(page).name for page in WRITTEN}


def text_of(root: Path, page: str) -> str:
    """Return the Markdown of a page."""
    return WRITTEN[page]() if page in WRITTEN else (root / page).read_text(encoding="utf-8")


def targets_of(text: str) -> set[str]:
    """Collect the links and pictures of a page as written, except in code."""

    def walk(tokens: list[Token]) -> Iterator[str]:
        for token in tokens:
            for name in ("href", "src"):
                if value := token.attrGet(name):
                    yield str(value)
            yield from walk(token.children or [])

    return set(walk(MARKDOWN.parse(text)))


def staged(text: str, page: str, pages: dict[str, str], root: Path) -> tuple[str, set[str]]:
    """Write a page for the site, with links of the site, and the files of the repository that it needs.

    Missing targets stay unchanged.
    """
    files: set[str] = set()
    here = PurePosixPath(pages[page]).parent
    for target in sorted(targets_of(text)):
        parts = urlsplit(target)
        if parts.scheme or parts.netloc or not parts.path:
            continue
        named = os.path.normpath(PurePosixPath(page).parent / unquote(parts.path))
        if named in pages:
            leads_to = pages[named]
        elif named.startswith("docs/") or not (root / named).is_file() or named.startswith(".."):
            leads_to = named.removeprefix("docs/")
        else:  # as text, so that a browser shows it
            leads_to = f"{FILES}/{named}.txt"
            files.add(named)
        new = os.path.relpath(leads_to, here) + (f"#{parts.fragment}" if parts.fragment else "")
        text = text.replace(f"]({target})", f"]({new})")
    return text, files


def named_in(navigation: Any) -> Iterator[str]:
    """Yield the pages of a navigation: a name, a mapping of a title to more, or a list of these."""
    if isinstance(navigation, str):
        yield navigation
    else:
        for each in navigation.values() if isinstance(navigation, dict) else navigation:
            yield from named_in(each)


def check_navigation(settings: str, pages: dict[str, str]) -> None:
    """Compare the pages of the navigation with the existing ones. Raises SiteError."""
    named, there = list(named_in(tomllib.loads(settings)["project"]["nav"])), set(pages.values())
    problems = [f"{SETTINGS}: nav has {name}, which is not a page" for name in named if name not in there]
    problems += [f"{SETTINGS}: nav lacks {name}, so nobody finds it" for name in sorted(there.difference(named))]
    if problems:
        raise SiteError("\n".join(problems))


def stage(root: Path, folder: Path) -> dict[str, str]:
    """Write what the generator reads into `folder`, and return the pages. Raises SiteError."""
    pages = pages_of(root)
    settings = (root / SETTINGS).read_text(encoding="utf-8")
    check_navigation(settings, pages)
    (folder / "zensical.toml").write_text(settings, encoding="utf-8")
    shutil.copytree(root / "docs", folder / "pages", ignore=shutil.ignore_patterns("*.md", "*.toml", "__pycache__"))
    for page, name in pages.items():
        text, files = staged(text_of(root, page), page, pages, root)
        place = folder / "pages" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
        for each in files:
            copy = folder / "pages" / FILES / f"{each}.txt"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / each, copy)
    return pages


def generate(folder: Path) -> None:
    """Run the generator in `folder`, which writes site/ there. Raises SiteError."""
    program = Path(sys.prefix) / "docs" / "bin" / "zensical"
    if not program.exists():
        raise SiteError(f"{program} is missing: make docs")
    done = subprocess.run([program, "build", "--clean"], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (folder / "site" / "index.html").is_file():
        raise SiteError(f"zensical ended with exit code {done.returncode}\n{done.stdout}{done.stderr}".rstrip())


def build(root: Path, out: Path) -> int:
    """Build the site of a repository into `out`, replace what is there, and return the number of pages.

    Raises SiteError.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pages = stage(root, folder)
        generate(folder)
        if out.exists() and not (out / "index.html").is_file():
            raise SiteError(f"{out} exists and is not a site: name another folder by --out")
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folder / "site", out)
    return len(pages)


def main() -> int:
    """Build the site and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "docs-site", help="folder of the site")
    out: Path = parser.parse_args().out
    try:
        count = build(ROOT, out)
    except SiteError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{count} pages; open {out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
