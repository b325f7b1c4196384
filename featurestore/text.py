"""Text: lines of CSV, names of number types, and printable forms of texts and objects.

Quotes count as Arrow takes them: at the beginning of a value alone, doubled within it, with line breaks between them.
"""

import codecs
import contextlib
import csv
import difflib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice
from typing import IO, Any, Literal

from featurestore.problems import Problem

MOST_BREAKS = 100  # line breaks in one value; more is taken for a quote that is not closed
_TO_THE_QUOTE = re.compile(r'(?:[^"]++|"")*+')
_BUFFER_BYTES = 8 << 20


STYLE_BYTES = 1 << 20
"""Bytes read from the beginning of a file, for `find_style`."""
_DELIMITERS = ",;\t|"
_DECIMAL_COMMA = re.compile(r"-?\d+,\d+")
COMMA_NUMBER = re.compile(r"-?(\d+|\d{1,3}(\.\d{3})+)(,\d+)?")
_STYLE_ROWS = 200


@dataclass(frozen=True)
class CsvStyle:
    """The format of a CSV text."""

    delimiter: str = ","
    encoding: str = "utf-8"
    decimal: str = "."

    def __str__(self) -> str:
        names = {"\t": "tab", " ": "space"}
        shown = [f"delimiter {names.get(self.delimiter, self.delimiter)}", f"encoding {self.encoding}"]
        return ", ".join([*shown, f"decimal {self.decimal}"])


def find_style(
    beginning: bytes, delimiter: str | None = None, encoding: str | None = None, decimal: str | None = None
) -> CsvStyle:
    """Detect the dialect of a text from its beginning, except options that are given.

    The delimiter is the character that makes most names of the first line; a text that is not UTF-8 is Latin-1, or
    Windows' form of it; the decimal sign is a comma where a column has nothing but such numbers. Raises CsvTextError.
    """
    check_encoding(beginning[:4])
    encoding = encoding or _encoding_of(beginning)
    if delimiter is None:
        names = {each: first_rows(beginning, CsvStyle(each, encoding), 1) for each in _DELIMITERS}
        delimiter = max(_DELIMITERS, key=lambda each: max(map(len, names[each]), default=0))
    if decimal is None:
        rows = first_rows(beginning, CsvStyle(delimiter, encoding), _STYLE_ROWS)[1:]
        decimal = "," if delimiter != "," and any(map(_has_decimal_comma, zip(*rows, strict=False))) else "."
    return CsvStyle(delimiter, encoding, decimal)


def first_rows(beginning: bytes, style: CsvStyle, most: int) -> list[list[str]]:
    """Split the beginning of a text into rows, that of the names first; those before a mistake. Raises CsvTextError."""
    try:
        text = beginning.decode(style.encoding, errors="replace").removeprefix("\ufeff")
    except LookupError as failure:
        raise CsvTextError(Problem.UNKNOWN_ENCODING.of(style.encoding)) from failure
    rows: list[list[str]] = []
    with contextlib.suppress(csv.Error):
        rows.extend(islice((row for row in csv.reader(io.StringIO(text, ""), delimiter=style.delimiter) if row), most))
    return rows[:-1] if len(rows) > 1 and len(rows) < most and len(beginning) >= STYLE_BYTES else rows


def parse_decimal_comma(text: str) -> float:
    """Parse a number such as 1.234,5, whose points are between thousands. Raises ValueError."""
    if not COMMA_NUMBER.fullmatch(text):
        raise ValueError(text)
    return float(text.replace(".", "").replace(",", "."))


def _encoding_of(beginning: bytes) -> str:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(beginning)
        return "utf-8"
    except UnicodeDecodeError:
        return "cp1252" if any(0x80 <= byte < 0xA0 for byte in set(beginning)) else "latin-1"


def _has_decimal_comma(column: tuple[str, ...]) -> bool:
    values = [value.strip() for value in column if value.strip()]
    return all(map(COMMA_NUMBER.fullmatch, values)) and any(map(_DECIMAL_COMMA.fullmatch, values))


class CsvTextError(ValueError):
    """The text cannot be split into rows; the message has the position and the way out."""


@dataclass(frozen=True)
class LongRow:
    """A row whose quoted values continue over several lines, the first of them `line` (from 1, that of the names)."""

    line: int
    breaks: int
    swallowed: bool
    """A value has a delimiter for each value of as many rows as it has line breaks: it holds rows, most likely."""


def long_rows(file: IO[bytes], delimiter: str, most_lines: int | None = None) -> dict[int, LongRow]:
    """Find rows over several lines by their numbers, from 0, the names not counted; empty lines are not rows.

    Reads the file once, or its first `most_lines`. Raises CsvTextError for text in UTF-16 or UTF-32, and for a quoted
    value that does not end, or not within MOST_BREAKS lines.
    """
    stream = io.BufferedReader(file, _BUFFER_BYTES)  # type: ignore[type-var]
    check_encoding(stream.peek(4)[:4])
    text = io.TextIOWrapper(stream, encoding="latin-1")  # which reads everything; all that counts here is ASCII
    try:
        return _Scan(delimiter).rows(text, most_lines)
    finally:
        text.detach()
        stream.detach()


def check_encoding(beginning: bytes) -> None:
    """Raise CsvTextError where the first bytes of a text are not UTF-8's."""
    if beginning[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in beginning[:4]:
        raise CsvTextError(Problem.NOT_UTF8.of())


class _Scan:
    """Scan of the lines of a file: outside of values in quotes, or inside one that began in an earlier line."""

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter
        start = rf'(?:\A|{re.escape(delimiter)})"'
        self._opening = re.compile(start)
        self._closed = re.compile(rf'{start}(?:[^"]++|"")*+"')
        self._columns = 0
        self._begun: int | None = None  # the line in which the open value begins
        self._breaks = self._delimiters = 0  # of the open value so far

    def rows(self, text: IO[str], most_lines: int | None) -> dict[int, LongRow]:
        found: dict[int, LongRow] = {}
        row, first_line, breaks, swallowed, names = -1, 0, 0, False, ""
        for number, line in enumerate(islice(text, most_lines), 1):
            if self._begun is None:
                if line == "\n":
                    continue
                row, first_line, breaks, swallowed = row + 1, number, 0, False
            if self._begun is not None or ('"' in line and '"' in self._closed.sub("", line)):
                swallowed |= self._look(line, number)
            if row == 0:
                names += line
                self._columns = len(next(csv.reader(io.StringIO(names), delimiter=self._delimiter)))
            if self._begun is not None:
                breaks += 1
            elif breaks:
                found[row - 1] = LongRow(first_line, breaks, swallowed)
        if self._begun is not None and next(text, None) is None:
            raise self._error(Problem.QUOTE_NOT_CLOSED)
        return found

    def _look(self, line: str, number: int) -> bool:
        """Follow the quotes of a line; return whether a value that ends in it has swallowed rows."""
        at, swallowed = 0, False
        while True:
            if self._begun is None:
                opening = self._opening.search(line, at)
                if opening is None:
                    return swallowed
                self._begun, self._breaks, self._delimiters = number, 0, 0
                at = opening.end()
            match = _TO_THE_QUOTE.match(line, at)
            end = match.end() if match else at
            self._delimiters += line.count(self._delimiter, at, end)
            if end == len(line):
                self._breaks += 1
                if self._breaks > MOST_BREAKS:
                    raise self._error(Problem.QUOTE_TOO_LONG, MOST_BREAKS)
                return swallowed
            swallowed |= self._delimiters == self._breaks * (self._columns - 1) > 0
            self._begun, at = None, end + 1

    def _error(self, problem: Problem, *values: object) -> CsvTextError:
        return CsvTextError(problem.of(self._begun, *values))


DType = Literal["bfloat16", "float16", "float32"]
"""Float types that a store can have."""


_PASSWORD = re.compile(r"(://[^\s/@:]*):[^\s/]*@")


def printable(text: str) -> str:
    r"""Return `text` with invisible characters spelled out, e.g. a line break as \n and a stray byte as \xff."""
    return text if text.isprintable() else "".join(map(_spelled, text))


def one_line(error: Exception | str) -> str:
    """Return the message of another library as one line."""
    return " ".join(str(error).split()) or type(error).__name__


def refusal(error: OSError) -> str:
    """Return why the system refused a file, without its name, which may be that of a temporary one."""
    return error.strerror or one_line(error)


def without_passwords(text: str) -> str:
    """Return `text` with the passwords of addresses hidden: https://user:***@host."""
    return _PASSWORD.sub(r"\1:***@", text)


def count_text(number: int, thing: str) -> str:
    """Format a number of things, e.g. `1 file` or `2,000 files`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


LONGEST_NAME = 200
"""Longest name that is compared with the known ones, as a comparison costs the product of both lengths."""


def near_match(name: str, known: Sequence[str], prefix: str = "") -> str:
    """End a message about an unknown name: with the nearest known one, or with all of them when none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6) if len(name) <= LONGEST_NAME else []
    if near:
        return f"did you mean {prefix}{near[0]}?"
    return f"known: {', '.join(prefix + each for each in sorted(known))}"


def ranges_text(numbers: Sequence[int]) -> str:
    """Format ascending numbers in short, e.g. `1 to 3, 7, 8`."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    texts = (f"{group[0]} to {group[-1]}" if len(group) > 2 else ", ".join(map(str, group)) for group in groups)
    return ", ".join(texts)


def _spelled(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # how Python carries a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


class Shown:
    """Something with an address and some values, which its text and its table in a notebook have."""

    def _about(self) -> tuple[str, dict[str, Any]]:
        raise NotImplementedError

    def __repr__(self) -> str:
        address, values = self._about()
        shown = [repr(address), *(f"{name}={_short(value)}" for name, value in values.items())]
        return f"{type(self).__name__}({', '.join(shown)})"

    def _repr_html_(self) -> str:
        address, values = self._about()
        rows = [f"<tr><th>{escape(name)}</th><td>{escape(_short(value))}</td></tr>" for name, value in values.items()]
        return f"<table><caption>{escape(address)}</caption>{''.join(rows)}</table>"


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
