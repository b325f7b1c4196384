"""The short run: parsers of what others write keep the rule on inputs that are the same each time; bugs are noticed."""

from collections import Counter

import pytest

from tests.fuzz.mutate import YAML
from tests.fuzz.parsers import PARSERS, Parser
from tests.fuzz.planted import BUGS
from tests.fuzz.run import check, fuzz
from tests.simulated.planted import Bug

pytestmark = pytest.mark.long


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_an_input_has_a_value_or_a_named_error(parser: Parser) -> None:
    assert all(check(parser, data) for data in parser.valid())
    count = 50 if parser.form is YAML else 150  # PyYAML takes a second for twenty
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
        assert fuzz(next(each for each in PARSERS if each.name == bug.kind), 300)[1] is not None


def test_a_digest_that_is_no_text_is_an_error_with_a_name() -> None:
    parser = next(each for each in PARSERS if each.name == "manifest")
    valid = parser.valid()[0]
    start = valid.rindex(b'"digest": "') + len(b'"digest": "')
    assert not check(parser, valid[:start] + b"\\ud800" + valid[valid.index(b'"', start) :])
