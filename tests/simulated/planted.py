"""Bugs that are planted, one at a time, to see that histories find them: each takes a guard of a protocol out.

planted.toml has them. A bug is a text of one function that becomes another one: the function's code is compiled again,
so that whoever has the function by any name has the bug.
"""

import contextlib
import inspect
import pkgutil
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

import pytest


@dataclass(frozen=True)
class Bug:
    """A guard, the kind of histories that reach it, where it stands, and the text with what takes its place."""

    guard: str
    kind: str
    place: str
    old: str
    new: str
    also: tuple[tuple[str, str, str], ...] = ()
    """Places, texts and what takes their place of guards that do the same: they go with it."""

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        """Plant it for the time of the block."""
        sources: dict[str, str] = {}
        with pytest.MonkeyPatch.context() as patch:
            for place, old, new in ((self.place, self.old, self.new), *self.also):
                found = pkgutil.resolve_name(place)
                function = inspect.unwrap(getattr(found, "__func__", found))  # that of a class method
                source = sources.get(place) or textwrap.dedent(inspect.getsource(function))
                assert source.count(old) == 1, f"{place} has {source.count(old)} times: {old}"
                sources[place] = source.replace(old, new)
                module = compile(sources[place], inspect.getfile(function), "exec")
                codes = [each for each in module.co_consts if isinstance(each, CodeType)]
                patch.setattr(function, "__code__", next(each for each in codes if each.co_name == function.__name__))
            yield


BUGS = [Bug(**each) for each in tomllib.loads(Path(__file__).with_suffix(".toml").read_text())["bug"]]
