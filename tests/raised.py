"""Errors as tests compare them: by class, problem and values, so that a better word changes no test."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from string import Formatter
from typing import TypeVar

import pytest

from featurestore.errors import Sentences, UserError

E = TypeVar("E", bound=UserError)
ANY = re.compile(r"[\s\S]*?")


@contextmanager
def raises(kind: type[E], problem: Sentences, /, **values: object) -> Iterator[pytest.ExceptionInfo[E]]:
    """Expect an error of `kind` with this problem and, among its values, these."""
    with pytest.raises(kind) as caught:
        yield caught
    compare(caught.value, problem, **values)


def compare(error: BaseException, problem: Sentences, /, **values: object) -> None:
    """See that `error` has this problem and, among its values, these, as texts; a compiled pattern is searched for."""
    assert isinstance(error, UserError), repr(error)
    assert error.problem is problem, f"{error.problem!r}: {error}"
    for name, wanted in values.items():
        found = str(error.values[name])
        same = wanted.search(found) if isinstance(wanted, re.Pattern) else found == str(wanted)
        assert same, f"{name} is {found!r}, not {wanted!r}: {error}"


def told(problem: Sentences, /, **values: object) -> str:
    """Return a regular expression of the sentence of `problem` with these values, and anything in place of others.

    For text that a command or a server wrote; a value may be a compiled pattern.
    """
    parts = []
    for literal, name, spec, conversion in Formatter().parse(problem):
        parts.append(re.escape(literal))
        wanted = values.get(name or "", ANY)
        if not name or isinstance(wanted, re.Pattern):
            parts.append(wanted.pattern if name else "")
        else:
            field = "{" + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}"
            parts.append(re.escape(field.format(wanted)))
    return "".join(parts)
