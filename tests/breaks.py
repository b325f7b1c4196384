"""Plant small faults in copies of the checkout, one at a time, and check that the tests notice each: `make breaks`.

tests/breaks.toml has the faults: the package, a text that stands exactly once in its .py files, what replaces it, what
a user would suffer, and the tests that have to fail. Modules and test files may move: they are searched for.

python -m tests.breaks                     run all; exit 1 where a fault is not noticed
python -m tests.breaks --only 3,7          run some of them; --list prints their numbers
python -m tests.breaks --check             run nothing: is every text there once, and every test? (part of `make lint`)

A test is named as test_x, test_x[case] or TestY::test_x, where that is not the only one with the end of its file's path
before it, as serving/test_z.py::test_x; or a file alone is. The tests first run without a fault, as a test that fails
anyway notices nothing. The working tree is never changed.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_suffix(".toml")
LIMIT_S = 400
"""Of the tests of one fault: more than pytest gives a single test, which fails where a fault lets it hang."""
_TEST = re.compile(r"^(?:class (\w+)|( *)(?:async )?def (test_\w+)\()", re.MULTILINE)
_FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
Say = Callable[[str], None]
Status = Literal["noticed", "GAP", "unsound"]


@dataclass(frozen=True, kw_only=True)
class Break:
    """A fault: in the .py files of `package`, `old` becomes `new`; then one of `tests` has to fail."""

    number: int
    package: str
    old: str
    new: str
    harm: str
    tests: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a fault; `by`: the test that failed first, or why the result is unsound.

    Unsound: the tests fail without the fault too, or cannot be collected with it, or do not end.
    """

    number: int
    status: Status
    by: str
    seconds: float


def read_breaks(file: Path = LIST) -> list[Break]:
    """Read the list of faults, numbered from 1."""
    packages = tomllib.loads(file.read_text(encoding="utf-8"))
    entries = [{"package": package, **entry} for package, entries in packages.items() for entry in entries]
    return [Break(**{**entry, "number": n, "tests": tuple(entry["tests"])}) for n, entry in enumerate(entries, 1)]


class Checkout:
    """A folder with the packages and their tests, which are searched for the texts and names of faults."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def _sources(self) -> dict[str, str]:
        """The texts of all .py files by their paths below the root, except in hidden folders."""
        folders = sorted(each for each in self.root.iterdir() if each.name[0] != ".")
        paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
        return {path.relative_to(self.root).as_posix(): path.read_text(encoding="utf-8") for path in paths}

    @cached_property
    def _tests(self) -> dict[str, list[tuple[str, str]]]:
        """File and class, or none, of each function of a test and, by its own name, of each class of tests."""
        found: dict[str, list[tuple[str, str]]] = {}
        for path, text in self._sources.items():
            inside = ""
            for group, indent, name in _TEST.findall(text) if path.startswith("tests/") else ():
                inside = group or inside
                found.setdefault(group or name, []).append((path, inside if group or indent else ""))
        return found

    def files_with(self, each: Break) -> list[str]:
        """List the files of the package that have the old text, each as often as it has it."""
        inside = [(path, text) for path, text in self._sources.items() if path.startswith(f"{each.package}/")]
        return [path for path, text in inside for _ in range(text.count(each.old))]

    def nodes_of(self, test: str) -> list[str]:
        """List the pytest nodes that a test's name may mean: one, if it is right."""
        if test.endswith(".py"):
            return [path for path in self._sources if f"/{path}".endswith(f"/{test}")]
        name, bracket, case = test.partition("[")
        *where, name = name.split("::")
        end = next((f"/{each}" for each in where if each.endswith(".py")), "")
        group = next((each for each in where if not each.endswith(".py")), None)
        known = self._tests.get(group or name, []) if name in self._tests else []  # a class may inherit its tests
        return [
            "::".join([path, *([inside] if inside else []), name + bracket + case])
            for path, inside in known
            if "/test_" in path and inside[:4] in ("", "Test") and f"/{path}".endswith(end)
        ]

    def problems(self, breaks: Sequence[Break]) -> list[str]:
        """List the faults that do not fit the sources, to be adapted after a change."""
        found = []
        for each in breaks:
            if len(files := self.files_with(each)) != 1:
                places = f" ({', '.join(sorted(set(files)))})" if files else ""
                found.append(f"{each.number}: {each.package} has {len(files)} times{places}: {each.old}")
            if each.old == each.new or not each.tests:
                found.append(f"{each.number}: it changes nothing, or names no test")
            meant = [(test, self.nodes_of(test)) for test in each.tests]
            wrong = [(test, nodes) for test, nodes in meant if len(nodes) != 1]
            found += [f"{each.number}: {test} means {', '.join(nodes) or 'no test'}" for test, nodes in wrong]
        return found


def run_pytest(copy: Path, nodes: Sequence[str], *options: str, limit_s: float = LIMIT_S) -> tuple[int, str]:
    """Run these tests in a copy; return pytest's exit code, -1 after the limit, and its output."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider"]
    process = subprocess.Popen(
        [*command, f"--basetemp={copy}-tmp", *options, *nodes],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return -1, f"no end after {limit_s:g} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also processes that a killed test has started
        process.wait()


@contextmanager
def planted(copy: Path, each: Break) -> Iterator[None]:
    """Plant the fault in a copy for the block."""
    (path,) = Checkout(copy).files_with(each)
    file = copy / path
    text, time_ns = file.read_text(encoding="utf-8"), file.stat().st_mtime_ns
    file.write_text(text.replace(each.old, each.new), encoding="utf-8")
    os.utime(file, ns=(time_ns, time_ns + each.number * 10**9))  # Python knows compiled modules by second and size
    try:
        yield
    finally:
        file.write_text(text, encoding="utf-8")
        os.utime(file, ns=(time_ns, time_ns))


def try_break(copy: Path, each: Break, nodes: Sequence[str]) -> Result:
    """Plant a fault, and run its tests until the first fails."""
    start = time.monotonic()
    with planted(copy, each):
        code, output = run_pytest(copy, nodes, "-x")
    status: Status = "GAP" if code == 0 else "noticed" if code == 1 else "unsound"
    seconds = round(time.monotonic() - start, 1)
    return Result(number=each.number, status=status, by=_reason(output) if code else "", seconds=seconds)


def _reason(output: str) -> str:
    """Return the first test that failed, or pytest's last line."""
    failed = _FAILED.search(output)
    return failed[1] if failed else (output.strip().splitlines() or [""])[-1]


def copy_checkout(root: Path, target: Path) -> None:
    """Copy the files that git tracks, or would add, as they are in the working tree."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def run_all(root: Path, breaks: Sequence[Break], say: Say = print) -> list[Result]:
    """Try all faults in a copy, one after the other."""
    checkout, results = Checkout(root), list[Result]()
    nodes = {each.number: [node for test in each.tests for node in checkout.nodes_of(test)] for each in breaks}
    with tempfile.TemporaryDirectory(prefix="breaks-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder, "copy")
        copy_checkout(root, copy)
        failing = _failing(copy, nodes, say)
        for each in breaks:
            if without := [test for test in failing if any(_is_of(test, node) for node in nodes[each.number])]:
                reason = f"without the fault: {without[0]}"
                result = Result(number=each.number, status="unsound", by=reason, seconds=0)
            else:
                result = try_break(copy, each, nodes[each.number])
            results.append(result)
            line = f"{len(results)}/{len(breaks)} break {result.number}: {result.status}, {result.seconds} s"
            say(f"{line}, {result.by}".removesuffix(", "))
    return results


def _failing(copy: Path, nodes: dict[int, list[str]], say: Say) -> list[str]:
    """Run all tests once without a fault; return those that fail. Exits where pytest does not run them all."""
    start, union = time.monotonic(), list(dict.fromkeys(node for each in nodes.values() for node in each))
    code, output = run_pytest(copy, union, limit_s=LIMIT_S * len(nodes))
    if code not in (0, 1):
        raise SystemExit(f"the tests cannot be run without a fault:\n{output}")
    failing = _FAILED.findall(output)
    say(f"{len(union)} tests without a fault: {len(failing)} fail, {time.monotonic() - start:.1f} s")
    return failing


def _is_of(test: str, node: str) -> bool:
    """Return whether a test is that node, or one of its cases, or in its file."""
    return test.startswith(node) and test[len(node) :][:1] in ("", "[", ":")


def table(breaks: Sequence[Break], results: Sequence[Result]) -> str:
    """Write the results as a table, one line a fault."""
    rows = [("", "package", "what a user would suffer", "noticed by", "s")]
    named = {each.number: each for each in breaks}
    for result in results:
        each = named[result.number]
        by = (
            result.by.partition("[")[0].rpartition("::")[2]
            if result.status == "noticed"
            else f"{result.status} {result.by}".strip()
        )
        rows.append((str(each.number), each.package, each.harm, by, f"{result.seconds:.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    noticed = sum(result.status == "noticed" for result in results)
    return "\n".join([*lines, f"{noticed} of {len(results)} noticed"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.breaks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only check that every text and test exists once")
    parser.add_argument("--list", action="store_true", help="print the faults")
    parser.add_argument("--only", type=_numbers, help="numbers of faults, as 3,7", default=())
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    """Run, check or list the faults; return the exit code."""
    asked, breaks = _options(), read_breaks()
    if asked.list:
        print("\n".join(f"{each.number:2} {each.package:20} {each.harm}" for each in breaks))
        return 0
    if problems := Checkout(ROOT).problems(breaks):
        print("\n".join(f"{LIST.name}: {problem}" for problem in problems), file=sys.stderr)
        return 1
    if asked.check:
        return 0
    if unknown := [number for number in asked.only if number not in range(1, len(breaks) + 1)]:
        print(f"--only {unknown[0]}: there are {len(breaks)} faults, see --list", file=sys.stderr)
        return 2
    chosen = [each for each in breaks if not asked.only or each.number in asked.only]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    start = time.monotonic()
    results = run_all(ROOT, chosen, lambda text: print(text, flush=True))
    print(f"\n{table(chosen, results)}, {time.monotonic() - start:.0f} s")
    return 0 if all(result.status == "noticed" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
