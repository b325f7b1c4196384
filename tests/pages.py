"""Report pages as tests read them: the lines and cells of a page, and what no page may have."""

import base64
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

_VOID = {"meta", "img"}
_KNOWN = {"html", "head", "title", "style", "body", "main", "h1", "pre", "span", "p", *_VOID}
_SUMMARY_LINE = re.compile(r"(\S+(?: \S+)*) {2,}(?<=^.{13})(.*)")  # a name, and what comes from column 13 on


class ReadPage(HTMLParser):
    """A page, read: `tags` and `attributes` as they come, what was `printed`, and the titles of `plots`."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tags, self.open = text, list[str](), list[str]()
        self.attributes: list[tuple[str, str, str]] = []
        self.titles: list[str] = []
        self.plots: list[str] = []
        self.printed = ""
        self.feed(text)
        self.close()
        assert self.open == [], "an element is not closed"
        self.texts = [line.strip() for line in self.printed.splitlines()]
        self.rows = [row for line in self.printed.splitlines() if (row := _cells(line))]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        self.plots += [value or "" for name, value in attributes if (tag, name) == ("img", "alt")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self.open:
            self.printed += data
        if self.open and self.open[-1] in ("title", "h1"):
            self.titles.append(data)

    def value(self, name: str) -> list[str]:
        """Return the cells that come after the one with this text, in its row."""
        return next(row[row.index(name) + 1 :] for row in self.rows if name in row)


def _cells(line: str) -> list[str]:
    """Return the cells of a line of a table, or the name and the text of a line of a job; none of another line."""
    if line.startswith(("│", "┃")):
        return [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
    named = _SUMMARY_LINE.fullmatch(line)
    return [named[1], named[2]] if named else []


def check_page(text: str) -> ReadPage:
    """Check that a page is complete, inert and needs nothing else; return it as read."""
    page = ReadPage(text)
    assert set(page.tags) <= _KNOWN, "an element that no page has: a script, a form or a link"
    names = {name for _, name, _ in page.attributes}
    assert names <= {"lang", "charset", "name", "content", "http-equiv", "class", "tabindex", "alt", "src"}
    for drawn in (value for _, name, value in page.attributes if name == "src"):
        kind, _, data = drawn.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")
    assert page.tags.count("img") == len(page.plots)
    assert not re.search(r"url\(|@import", text)
    assert "default-src 'none'" in text and "script-src" not in text
    for each in ("h1", "main", "title", "pre"):
        assert page.tags.count(each) == 1
    return page
