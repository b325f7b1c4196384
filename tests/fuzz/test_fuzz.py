"""The short run: parsers of what others write keep the rule on inputs that are the same each time; bugs are noticed."""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.fuzz.mutate import YAML
from tests.fuzz.parsers import PARSERS, Parser, named
from tests.fuzz.planted import BUGS
from tests.fuzz.run import BrokenRuleError, check, fuzz
from tests.planted import Bug

pytestmark = pytest.mark.long


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_an_input_has_a_value_or_a_named_error(parser: Parser) -> None:
    assert all(check(parser, data) for data in parser.valid())
    count = 25 if parser.form is YAML else 150  # PyYAML takes a second for twenty
    values, finding = fuzz(parser, count)
    assert finding is None and values < count


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.kind}, {bug.guard}")
def test_a_planted_bug_has_its_place(bug: Bug) -> None:
    with bug.planted():
        pass


def test_each_parser_has_at_least_four_planted_bugs() -> None:
    planted = Counter(bug.kind for bug in BUGS)
    assert planted.keys() == {parser.name for parser in PARSERS}
    assert min(planted.values()) >= 4, planted


def test_a_planted_bug_is_found() -> None:
    bug = next(each for each in BUGS if each.kind == "json request")
    with bug.planted():
        assert fuzz(named(bug.kind), 300)[1] is not None


def _for_ever(data: bytes) -> None:
    """Loop, and catch all errors."""
    for _ in itertools.count():
        with contextlib.suppress(Exception):
            bytes(data)


@pytest.mark.parametrize(
    ("parse", "why"),
    [
        (lambda data: sum(range(30_000_000)), "took .* s"),
        (_for_ever, "took .* s"),
        (lambda _: b"1" * 10**8, "took .* MB"),
    ],
    ids=["long", "for ever", "large"],
)
def test_time_and_memory_of_each_input_are_bounded(parse: Callable[[bytes], object], why: str) -> None:
    assert all(0 < parser.most_s <= 4 and 0 < parser.most_mb <= 300 for parser in PARSERS)
    large = b"1" * (2 * 10**8)  # of an input before
    del large
    with pytest.raises(BrokenRuleError, match=why):
        check(replace(PARSERS[0], parse=parse, most_s=0.1, most_mb=60), b"")


def test_a_digest_that_is_no_text_is_an_error_with_a_name() -> None:
    parser = named("manifest")
    valid = parser.valid()[0]
    start = valid.rindex(b'"digest": "') + len(b'"digest": "')
    assert not check(parser, valid[:start] + b"\\ud800" + valid[valid.index(b'"', start) :])
