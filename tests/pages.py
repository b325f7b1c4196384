"""Report pages as tests read them: the texts and cells of a page, and what no page may have."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

MOST_BYTES = 300_000
_VOID = {"meta", "link", "img"}
_KNOWN = {
    *("html", "head", "title", "style", "body", "header", "main", "footer", "section", "div", "h1", "h2", "p", "code"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd", "ul", "li", "time", "figure"),
    *_VOID,
}


class ReadPage(HTMLParser):
    """A page, read: `tags` and `attributes` as they come, `cells` of tables by row, `pairs` of a job's lines."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tags, self.open = text, list[str](), list[str]()
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.plots: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "an element is not closed"

    @classmethod
    def of(cls, path: Path) -> "ReadPage":
        """Read a file."""
        return cls(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        self.plots += [value or "" for name, value in attributes if (tag, name) == ("img", "alt")]
        if tag in ("tr", "dl"):
            self.rows.append([])
        if tag in ("th", "td", "dt", "dd"):
            self.rows[-1].append("")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("th", "td", "dt", "dd"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] != "style" and data.strip():
            self.texts.append(data.strip())

    def value(self, name: str) -> list[str]:
        """Return the cells that come after the one with this text, in its row."""
        return next(row[row.index(name) + 1 :] for row in self.rows if name in row)


def check_page(text: str) -> ReadPage:
    """Check that a page is small, complete, inert and needs nothing else; return it as read."""
    page = ReadPage(text)
    assert len(text.encode()) <= MOST_BYTES
    assert set(page.tags) <= _KNOWN, "an element that no page has: a script, a form or a link"
    names = [name for _, name, _ in page.attributes]
    assert not [name for name in names if name.startswith("on") or name in ("srcdoc", "action", "style")]
    for drawn in (value for _, name, value in page.attributes if name == "src"):
        kind, _, data = drawn.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")
    assert {value for _, name, value in page.attributes if "href" in name} == {"data:,"}
    assert not re.search(r"url\(|@import|https?://(?!\S*\*\*\*)\S+\.(?:js|css)", text)
    assert "default-src 'none'" in text
    identities = [value for _, name, value in page.attributes if name == "id"]
    assert len(set(identities)) == len(identities)
    named = [value for _, name, value in page.attributes if name == "aria-labelledby"]
    assert set(named) <= set(identities)
    assert page.tags.count("img") == len(page.plots)
    for each in ("h1", "main", "title", "header", "footer"):
        assert each in page.tags
    assert page.tags.count("caption") == page.tags.count("table")
    return page
