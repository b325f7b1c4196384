"""One report page: what a command printed, in that order, collected as plain texts and written as one HTML file."""

import base64
import io
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from featurestore.console.files import check_place, replace_file
from featurestore.errors import UserError
from featurestore.text import printable, refusal, without_passwords

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_BYTES = 300_000
"""Of a page. Rows and lines that would make it larger are left out, and the page says how many."""
_MOST_ROWS = (1000, 300, 100, 30, 10)
"""Of a table, a list and a part of the page: the first of these with which a page is small enough."""
_LONGEST_TEXT = 1000  # characters
_TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Paragraph:
    """A printed line; a problem says what is wrong, as a line on stderr does."""

    text: str
    is_problem: bool = False
    kind: Literal["paragraph"] = "paragraph"


@dataclass
class Points:
    """Printed lines that began with "- "."""

    texts: list[str]
    kind: Literal["points"] = "points"


@dataclass(frozen=True)
class PageRow:
    """A row of a table: its cells, and whether it begins a part of the table, of which it is the heading."""

    cells: tuple[str, ...]
    is_heading: bool = False
    is_bold: bool = False


@dataclass(frozen=True)
class PageTable:
    """A table with a caption; `numbers` says of each column whether it is aligned on the right."""

    caption: str
    headings: tuple[str, ...]
    numbers: tuple[bool, ...]
    rows: tuple[PageRow, ...]
    kind: Literal["table"] = "table"


@dataclass
class Summary:
    """Lines of a job: the name of each, and what it says."""

    lines: list[tuple[str, str]]
    kind: Literal["summary"] = "summary"


Block = Paragraph | Points | PageTable | Summary


@dataclass(frozen=True)
class Plot:
    """A plot: what it shows, and its SVG in base 64."""

    title: str
    svg: str


@dataclass
class Part:
    """A heading, the blocks below it, and the plots next to them."""

    heading: str = ""
    blocks: list[Block] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)


class ReportPage:
    """The page of one call of a command.

    `title` says what the command does, `words` are those of its command line; passwords in addresses are hidden.
    """

    def __init__(self, path: Path, title: str, words: Sequence[str]) -> None:
        self.title = _plain(title)
        self.command = _plain(shlex.join(words))
        self.parts = [Part()]
        self._path, self._is_left_out = path, False

    def check_place(self) -> None:
        """Raise OutputPlaceError where the file cannot be written; called before the work, which may take hours."""
        check_place(self._path, "--html")

    def leave_out(self) -> None:
        """Write nothing at the end: another process of the same command writes the page."""
        self._is_left_out = True

    def add_line(self, text: str, *, is_problem: bool = False) -> None:
        """Add a line as a paragraph, or as one of several points where it begins with "- "."""
        plain, blocks = _plain(text), self.parts[-1].blocks
        if plain.startswith("- "):
            last = blocks[-1] if blocks else None
            if isinstance(last, Points):
                last.texts.append(plain[2:])
            else:
                blocks.append(Points([plain[2:]]))
        elif plain:
            blocks.append(Paragraph(plain, is_problem))

    def add_heading(self, text: str) -> None:
        """Begin a part with this heading."""
        if self.parts[-1] == Part():
            self.parts.pop()
        self.parts.append(Part(_plain(text)))

    def add_table(
        self, title: str, columns: Sequence[tuple[str, bool]], rows: Iterable[tuple[Sequence[str], bool]]
    ) -> None:
        """Add a table; one with a title begins a part, unless that has the heading already.

        `columns`: the heading of each, and whether it has numbers; `rows`: the cells, and whether they are bold.
        """
        plain = _plain(title)
        if plain and plain != self.parts[-1].heading:
            self.add_heading(plain)
        shown = []
        for texts, is_bold in rows:
            cells = tuple(map(_plain, texts))
            shown.append(PageRow(cells, len(cells) > 1 and bool(cells[0]) and not any(cells[1:]), is_bold))
        headings, numbers = tuple(_plain(name) for name, _ in columns), tuple(number for _, number in columns)
        caption = plain or self.parts[-1].heading or self.title
        self.parts[-1].blocks.append(PageTable(caption, headings, numbers, tuple(shown)))

    def add_summary(self, lines: Sequence[tuple[str, str]]) -> None:
        """Add lines of a job; those that follow each other are one list."""
        added, blocks = [(_plain(name), _plain(text)) for name, text in lines], self.parts[-1].blocks
        last = blocks[-1] if blocks else None
        if isinstance(last, Summary):
            last.lines.extend(added)
        else:
            blocks.append(Summary(added))

    def add_plot(self, figure: "Figure") -> None:
        """Put a figure of matplotlib next to the blocks of the last part, as SVG; its title says what it shows."""
        from matplotlib import rc_context

        file = io.StringIO()
        with rc_context({"svg.fonttype": "none"}):
            figure.savefig(file, format="svg", metadata={"Date": None})
        title = figure.get_suptitle() or figure.axes[0].get_title() or figure.axes[0].get_title(loc="left")
        svg = "\n".join(map(printable, file.getvalue().split("\n")))
        self.parts[-1].plots.append(Plot(_plain(title), base64.b64encode(svg.encode()).decode()))

    def html(self) -> str:
        """Write the page as text."""
        from jinja2 import Environment, StrictUndefined

        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
        source = resources.files("featurestore.console.page").joinpath(_TEMPLATE).read_text(encoding="utf-8")
        template, made_at, text = environment.from_string(source), datetime.now(UTC), ""
        for most in _MOST_ROWS:
            text = template.render(page=self, made_at=made_at, most=most)
            if len(text.encode()) <= MOST_BYTES:
                break
        return text

    def write(self) -> None:
        """Write the file, whole or not at all. Raises UserError."""
        if self._is_left_out:
            return
        try:
            replace_file(self._path, self.html())
        except OSError as error:
            raise UserError(f"cannot write --html {self._path}: {refusal(error)}") from error


def _plain(text: str) -> str:
    """Return a text in one line, without passwords of addresses, cut where it is longer than anybody reads."""
    plain = printable(without_passwords(text.strip()))
    return plain if len(plain) <= _LONGEST_TEXT else f"{plain[:_LONGEST_TEXT]}…"
