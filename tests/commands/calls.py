"""Command lines, called in this process as a shell would call them: what they print, and the code they exit with."""

import contextlib
import functools
import importlib
import io
import re
import shlex
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from featurestore.console import commandline
from featurestore.errors import Sentences
from tests.raised import told

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = {
    "crossmedia.__main__", "benchmarks.quality.fuxi", "benchmarks.serve.rivals", "benchmarks.train.peer",
    "tools.breaks", "tools.browser.screenshots", "tools.reference", "tools.settings", "tools.site", "tools.tree",
    "tools.tutorial", "trainer.agent",
}  # fmt: skip
"""Programs that other programs start, that keep this repository in order, or that call the commands here by a name."""


def commands() -> dict[str, str]:
    """Find all commands: the first word of a line, and the module whose `app` it calls."""
    found = {"dask-submit": "pipeline.cluster.submit"}
    for package in (
        "crossmedia", "featurestore", "pipeline", "trainer", "serving", "explorer", "jobs", "benchmarks", "tools",
    ):  # fmt: skip
        for file in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            if '\nif __name__ == "__main__":' in file.read_text(encoding="utf-8") and module not in PROGRAMS:
                name = module.removesuffix(".__main__")
                found[name.replace(".", "/") if package in ("jobs", "tools") else name] = module
    return found


COMMANDS = commands()
PARSED = functools.cache(commandline.get_command)
"""The parser of each app, which is made once for all lines: to make it takes as long as many a line."""
CHECKED = functools.cache(commandline._check_numbers_of)
HUGE = "99999999999999999999"
Told = str | tuple[Sentences, Mapping[str, object]]
"""What a message has to tell: a problem, alone or with values of it, or words."""


@dataclass(frozen=True)
class Called:
    """How a command line ended. `trace`: the traceback that a person would have seen."""

    code: int
    out: str
    err: str
    trace: str


def process_of(words: list[str]) -> list[str]:
    """The same command line for a process of its own, as the documentation writes it."""
    name, arguments = words[0], words[1:]
    if name == "dask-submit":
        return [str(Path(sys.executable).with_name(name)), *arguments]
    if "/" in name:
        return [sys.executable, str(ROOT / f"{name}.py"), *arguments]
    return [sys.executable, "-m", name, *arguments]


def pattern_of(told_of: Told, places: Mapping[str, object]) -> str:
    """A regular expression of a message; `{name}` in a word or a text is one of `places`."""
    problem, values = told_of if isinstance(told_of, tuple) else (told_of, {})
    if not isinstance(problem, Sentences):
        return re.escape(problem.format_map(places))
    placed = {name: each.format_map(places) if isinstance(each, str) else each for name, each in values.items()}
    return told(problem, **placed)


def words_of(line: str, places: Mapping[str, object]) -> list[str]:
    """The words of a line; `{name}` in a word is one of `places`, whatever characters that has."""
    return [word.format_map(places) for word in shlex.split(line)]


def call(words: list[str]) -> Called:
    """Call a command line in this process."""
    out, err, trace, code = io.StringIO(), io.StringIO(), "", 0
    with (
        mock.patch.object(sys, "argv", words),
        mock.patch.object(commandline, "get_command", PARSED),
        mock.patch.object(commandline, "_check_numbers_of", CHECKED),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            module = importlib.import_module(COMMANDS[words[0]])
            if words[0] == "dask-submit":
                module.main()
            else:
                commandline.run_app(module.app, words[0])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            code, trace = 1, traceback.format_exc()
    return Called(code, out.getvalue(), err.getvalue(), trace)
