"""The site of docs/: all pages with search that needs no network, and links that lead to pages and copies of files."""

import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from tools import site

pytestmark = [pytest.mark.long, pytest.mark.pages]
TAGS = re.compile(r"<(li|table|tr|pre|h1|h2|h3|h4|blockquote|img|strong|em)[\s>]")
ROOT = Path(__file__).parents[2]


def targets_of(page: Path, tags: str) -> set[str]:
    """What the tags of these names in a page lead to, or load."""
    return set(re.findall(rf'<(?:{tags})\b[^>]*?\b(?:href|src)="?([^"\s>]+)', page.read_text()))


def tags_of(html: str) -> Counter[str]:
    """How many tags a page has of each kind, inside <article> alone where it has one."""
    article = re.search(r"<article.*?</article>", html, re.DOTALL)
    return Counter(TAGS.findall(re.sub(r"<nav.*?</nav>", "", article[0] if article else html, flags=re.DOTALL)))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "docs-site"
    assert site.build(ROOT, out) == len(site.pages_of(ROOT))
    return out


def test_all_pages_are_in_navigation_and_search_and_nothing_comes_from_the_network(built: Path) -> None:
    links = targets_of(built / "index.html", "a")
    names = {re.sub(r"\.md$", ".html", name) for name in site.pages_of(ROOT).values()}
    assert {name for name in names if name not in links and f"./{name}" not in links} <= {"index.html"}
    index = (built / "search.js").read_text()  # a script, as a page that is a file can read no JSON
    assert all(word in index for word in ("SplitMix64", "WHY.html", "try a lower optim.lr"))
    assert (built / "assets" / "iframe-worker.js").is_file()
    for path in built.rglob("*.html"):
        loaded = targets_of(path, "script|img|iframe|source")
        assert not [target for target in loaded if re.match(r"(https?:)?//", target)], path
        sheets = re.findall(r'<link[^>]*rel="?(?:stylesheet|preconnect|preload)[^>]*>', path.read_text())
        assert not [sheet for sheet in sheets if "//" in sheet], path


@pytest.mark.parametrize("page", site.pages_of(ROOT))
def test_pages_look_as_on_a_git_host(built: Path, page: str) -> None:
    """Both make the same lists, tables and blocks of code: the generator is no CommonMark parser."""
    name = re.sub(r"\.md$", ".html", site.pages_of(ROOT)[page])
    ours = tags_of(site.MARKDOWN.render(site.text_of(ROOT, page)))
    assert tags_of((built / name).read_text()) == ours


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of three pages."""
    monkeypatch.setattr(site, "WRITTEN", {})
    root = tmp_path / "repository"
    (root / "docs").mkdir(parents=True)
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        (root / name).write_text("# A page\n")
    (root / "README.md").write_text("# First\n\n[A](docs/A.md#the-second-part) and ![drawn](docs/drawn.svg)\n")
    (root / "setup.cfg").write_text("[metadata]\n")
    (root / "docs" / "A.md").write_text(
        "# A\n\n[back](../README.md), [here](#the-second-part), [settings](../setup.cfg), [there](https://example.org)\n\n"
        "`[no](link.md)`\n\n```\n[no](link.md)\n```\n\n## The second part\n\nText.\n"
    )
    shutil.copytree(ROOT / "docs" / "assets", root / "docs" / "assets")
    shutil.copyfile(ROOT / "docs" / "ams.svg", root / "docs" / "drawn.svg")
    nav = 'nav = ["index.md", { "More" = ["A.md", { "Else" = "CONTRIBUTING.md" }] }, "CHANGELOG.md"]'
    settings = (ROOT / "docs" / "zensical.toml").read_text()
    (root / "docs" / "zensical.toml").write_text(re.sub(r"(?ms)^nav = \[.*?^\]", nav, settings))
    return root


def test_links_lead_to_copies_and_pages_and_navigation_have_to_agree(small: Path, tmp_path: Path) -> None:
    assert site.build(small, tmp_path / "out") == 4
    assert "files/setup.cfg.txt" in targets_of(tmp_path / "out" / "A.html", "a")
    assert (tmp_path / "out" / "files" / "setup.cfg.txt").read_text() == "[metadata]\n"
    assert "A.html#the-second-part" in targets_of(tmp_path / "out" / "index.html", "a")
    (small / "docs" / "A.md").rename(small / "docs" / "C.md")
    with pytest.raises(site.SiteError, match=r"nav has A\.md, which is not a page"):
        site.build(small, tmp_path / "out")


def test_a_failed_build_is_one_exit_code_and_keeps_the_old_site(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(site, "ROOT", small)
    monkeypatch.setattr(sys, "argv", ["site.py", "--out", str(out)])
    assert site.main() == 0
    assert "4 pages" in capsys.readouterr().out
    before = (out / "A.html").read_bytes()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all that I have")
    with pytest.raises(site.SiteError, match="is not a site"):
        site.build(small, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all that I have"
    (small / "docs" / "B.md").write_text("# B\n")
    assert site.main() == 1
    assert "nav lacks B.md" in capsys.readouterr().err
    assert (out / "A.html").read_bytes() == before
