"""Runs a parser on drawn inputs, and says which of them break the rule.

The rule: a value, or an error of those that the parser names, within its seconds and megabytes.
"""

import contextlib
import random
import resource
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.mutate import mutated
from tests.fuzz.parsers import Parser


class BrokenRuleError(Exception):
    """A parser raised something else, or took too long or too much memory."""


class StoppedError(BaseException):
    """A parser, which may catch any Exception, took more than twice its seconds."""


@dataclass(frozen=True)
class Finding:
    """An input that breaks the rule, and how."""

    data: bytes
    why: str


def check(parser: Parser, data: bytes) -> bool:
    """Parse an input; return whether it has a value. Raises BrokenRuleError."""
    begin_s, rest_mb, has_value = time.process_time(), _peak_mb(forget=True), False
    try:
        with _stopping(2 * parser.most_s), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parser.parse(data)
        has_value = True
    except parser.errors as failure:
        str(failure).encode()  # it can be printed
    except Exception as failure:
        raise BrokenRuleError(f"{type(failure).__name__}: {failure}") from failure
    if (spent_s := time.process_time() - begin_s) > parser.most_s:
        raise BrokenRuleError(f"took {spent_s:.1f} s")
    if (taken_mb := _peak_mb() - rest_mb) > parser.most_mb:
        raise BrokenRuleError(f"took {taken_mb:.0f} MB")
    return has_value


def fuzz(parser: Parser, examples: int, first: int = 0) -> tuple[int, Finding | None]:
    """Run a parser on so many inputs, the same for the same `first`; return how many have a value, and a finding."""
    values, valid = 0, parser.valid()
    for number in range(examples):
        data = mutated(random.Random(f"{parser.name} {first} {number}"), valid, parser.form)
        try:
            values += check(parser, data)
        except BrokenRuleError as failure:
            return values, Finding(data, str(failure))
    return values, None


@contextlib.contextmanager
def _stopping(most_s: float) -> Iterator[None]:
    """End the block after so many seconds of the processor, as soon as it runs Python's code: what is in C goes on."""

    def stop(*_: object) -> None:
        raise StoppedError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, most_s)
    try:
        with contextlib.suppress(StoppedError):
            yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


def _peak_mb(*, forget: bool = False) -> float:
    """Return the most memory that this process had since it was last told to `forget`, in MiB."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")  # else a large input before hides a smaller one
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
