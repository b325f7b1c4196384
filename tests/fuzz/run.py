"""Runs a parser on drawn inputs, and says which of them break the rule.

The rule: a value, or an error of those that the parser names, within its seconds and megabytes.
"""

import contextlib
import resource
import time
import warnings
from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Flaky

from tests.fuzz.mutate import inputs
from tests.fuzz.parsers import Parser


class BrokenRuleError(Exception):
    """A parser raised something else, or took too long or too much memory."""


@dataclass(frozen=True)
class Finding:
    """An input that breaks the rule, and how."""

    data: bytes
    why: str


def check(parser: Parser, data: bytes) -> bool:
    """Parse an input; return whether it has a value. Raises BrokenRuleError."""
    begin_s, peak_mb, has_value = time.process_time(), _peak_mb(), False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parser.parse(data)
        has_value = True
    except parser.errors as failure:
        str(failure).encode()  # it can be printed
    except Exception as failure:
        raise BrokenRuleError(f"{type(failure).__name__}: {failure}") from failure
    if (spent_s := time.process_time() - begin_s) > parser.most_s:
        raise BrokenRuleError(f"took {spent_s:.1f} s")
    if (taken_mb := _peak_mb() - peak_mb) > parser.most_mb:
        raise BrokenRuleError(f"took {taken_mb:.0f} MB")
    return has_value


def fuzz(parser: Parser, examples: int, first: int = 0, *, shrink: bool = False) -> tuple[int, Finding | None]:
    """Run a parser on so many inputs, the same for the same `first`; return how many have a value, and a finding."""
    values, found = 0, list[Finding]()

    @seed(first)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(inputs(parser.valid(), parser.form))
    def each(data: bytes) -> None:
        nonlocal values
        try:
            values += check(parser, data)
        except BrokenRuleError as failure:
            found.append(Finding(data, str(failure)))
            raise

    with contextlib.suppress(BrokenRuleError, Flaky):
        each()
    return values, found[-1] if found else None


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
