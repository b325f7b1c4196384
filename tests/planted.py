"""Bugs that are planted, one at a time, to see that histories or inputs find them: each takes a guard out.

A bug is a text of one function that becomes another one: the function's code is compiled again, so that whoever has the
function by any name has the bug.
"""

import contextlib
import inspect
import os
import pkgutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType

import pytest
import typer


@dataclass(frozen=True)
class Bug:
    """A guard, the kind of histories, or the parser, that reaches it, its place, and the text with what takes it."""

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
                patch.setattr(function, "__code__", _compiled(sources[place], function))
            yield


def _compiled(source: str, function: FunctionType) -> CodeType:
    """Compile the source of a function; where it needs names of a function around it, as super() does, inside one."""
    path = [function.__name__]
    if around := function.__code__.co_freevars:
        path.insert(0, "around")
        source = f"def around({', '.join(around)}):\n{textwrap.indent(source, '    ')}"
    code = compile(source, inspect.getfile(function), "exec")
    for name in path:
        code = next(each for each in code.co_consts if isinstance(each, CodeType) and each.co_name == name)
    return code


def hunt(bugs: Sequence[Bug], find: Callable[[Bug], str]) -> None:
    """Plant bugs, one at a time, and print how each is found; exit 1 where one is not, as `find` returns nothing."""
    missed = 0
    for bug in bugs:
        with bug.planted():
            found = find(bug)
        missed += not found
        print(f"{found or 'NOT FOUND':<90.90}  {bug.kind}: {bug.guard}", flush=True)
    print(f"{len(bugs)} bugs, {len(bugs) - missed} found; {sum(os.times()[:4]):.0f} s of a processor")
    raise typer.Exit(missed > 0)
