"""Texts of people: rows of CSV over several lines, as Arrow reads them, open quotes, and YAML that PyYAML fails at."""

import io
import random

import pyarrow as pa
import pytest
from pyarrow import csv

from featurestore.parsing import parse_yaml
from featurestore.problems import Problem
from featurestore.text import MOST_BREAKS, CsvTextError, LongRow, long_rows
from tests.raised import told


def rows(text: str, delimiter: str = ",", most_lines: int | None = None) -> dict[int, LongRow]:
    return long_rows(io.BytesIO(text.encode()), delimiter, most_lines)


def test_lines_and_breaks() -> None:
    text = 'a,b,c\n1,"x, y",3\n\n4,"two\nlines",6\r\n7,8,9\n"1\n\n2",5" tv,a"b\n'
    assert rows(text) == {1: LongRow(4, 1, False), 3: LongRow(7, 2, False)}
    assert rows(text.replace("\r\n", "\r").replace("\n", "\r")) == rows(text)
    assert rows(text.replace(",", "\t"), "\t") == rows(text)
    assert rows("") == rows("a,b") == rows('a,b\n"1","2"') == {}
    lines = ["a,b,c", '1,"2,3', "4,5,6", '7,"8,9', "1,2,3"]  # rows in a value are found out
    assert rows("\n".join(lines)) == rows("\n".join(['"a,x",b,c', *lines[1:]])) == {0: LongRow(2, 2, True)}


@pytest.mark.parametrize("end", ["", "\n", '""\n', 'b,""c""'])
def test_an_open_quote_is_an_error_with_its_line(end: str) -> None:
    text = "a,b\n" + "1,2\n" * 7 + '3,"4\n' + "5,6\n" * 20 + end
    for most_lines in (None, 1_000):
        with pytest.raises(CsvTextError, match=told(Problem.QUOTE_NOT_CLOSED, where=9)):
            rows(text, most_lines=most_lines)
    assert rows(text, most_lines=20) == {}


def test_a_value_of_very_many_lines_is_an_error() -> None:
    assert rows('a,b\n1,"' + "x\n" * MOST_BREAKS + '"\n') == {0: LongRow(2, MOST_BREAKS, False)}
    with pytest.raises(CsvTextError, match=told(Problem.QUOTE_TOO_LONG, where=2, limit=MOST_BREAKS)):
        rows('a,b\n1,"' + "x\n" * (MOST_BREAKS + 1) + '"\n')


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_told(encoding: str) -> None:
    with pytest.raises(CsvTextError, match=told(Problem.NOT_UTF8)):
        long_rows(io.BytesIO("a,b\n1,2\n".encode(encoding)), ",")
    assert long_rows(io.BytesIO("\ufeffa,b\n1,é\n".encode()), ",") == {}
    assert long_rows(io.BytesIO("a,b\n1,é\n".encode("latin-1")), ",") == {}


@pytest.mark.parametrize("seed", range(8))
def test_as_many_rows_as_arrow_finds(seed: int) -> None:
    """Random texts of few signs: where no quote stays open, breaks and rows add up to what Arrow makes of the text."""
    rng = random.Random(seed)
    closed = 0
    for _ in range(300):
        text = "a,b\n" + "".join(rng.choices('x,"\n', [4, 3, 3, 3], k=rng.randrange(1, 30))) + "\n"
        torn: list[object] = []
        options = csv.ParseOptions(
            newlines_in_values=True,
            ignore_empty_lines=False,
            invalid_row_handler=lambda row, torn=torn: torn.append(row) or "skip",
        )
        try:
            long = rows(text)
        except CsvTextError:
            continue
        table = csv.read_csv(pa.BufferReader(text.encode()), csv.ReadOptions(use_threads=False), options)
        inside = sum(each.breaks for each in long.values())
        assert table.num_rows + len(torn) + inside == text.count("\n") - 1, text
        closed += 1
    assert closed > 100


@pytest.mark.parametrize(
    "text",
    ["!!bool x", "!!int ''", "!!float ''", "!!timestamp x", '"\\UFFFFFFFF"', ":".join(["1"] * 400) + ".5"],
    ids=lambda text: text[:16],
)
def test_what_pyyaml_fails_at_is_a_mistake_of_the_text(text: str) -> None:
    with pytest.raises(ValueError) as failure:
        parse_yaml(f"a: {text}")
    assert "\n" not in str(failure.value)


def test_yaml_nested_too_deep_is_refused_before_it_is_looked_through() -> None:
    for text in ("[" * 100 + "]" * 100, "- " * 100 + "a"):
        parse_yaml(text)
    for text in ("[" * 101 + "]" * 101, "a: " + "{a: " * 20_000, "- " * 101 + "a", "? " * 101 + "a", "- " * 20_000):
        with pytest.raises(ValueError, match=told(Problem.NESTED_TOO_DEEP)):
            parse_yaml(text)
