"""Every command, found by itself: a quick help, a line for each kind of mistake, and one line for Ctrl-C."""

import enum
import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args, get_origin

import pytest
from typer.main import get_command
from typer.utils import get_params_from_function

from featurestore.console.commandline import CommandApp, power_of_two
from tests.cli import begun, ran, wait_until
from tests.commands.calls import COMMANDS, HUGE, PROGRAMS, ROOT, call, process_of
from tests.commands.lines import LINES

HEAVY = ("dask", "distributed", "faiss", "matplotlib", "pandas", "pyarrow", "s3fs", "scipy", "sklearn", "torch")
"""Libraries that take longest to import; a help needs none of them."""
WITHOUT_PLACES = {"benchmarks.quality", "crossmedia.demo", "trainer.launch", "trainer.supervise"}
"""Commands that read no folder themselves: they draw what they need, or hand their options to other commands."""
WRITERS = {
    *(f"benchmarks.{name}" for name in ("gpu", "growth", "serve", "store", "train", "workload")),
    "featurestore check-backend",
}
"""Commands whose one folder is made where it is not there."""
FILES = {
    "file", "config_file", "described", "schema", "mapping", "labels", "gates_file",
    "script", "token_file", "tls_cert", "tls_key", "ca", "scorer_token_file", "scorer_ca", "uris", "absent", "ads",
}  # fmt: skip
"""Parameters that name a file which a person wrote or chose."""
TOLD_ELSEWHERE = {("benchmarks.quality", "labels"), ("crossmedia.demo", "labels")}
"""They hand the file to jobs/make_demo_data."""
WRONG_FILES = ("{garbage}", "{list}", "{unknown}", "{deepyaml}", "{empty}", "{pipe}", "{pipe_yaml}")


def leaves() -> Iterator[tuple[str, Any]]:
    """Yield each command with its subcommand, as a line begins, and its click command."""
    for name, module in COMMANDS.items():
        if name == "dask-submit":
            continue
        command = get_command(importlib.import_module(module).app)
        subcommands = getattr(command, "commands", {})
        yield from ((f"{name} {each}", subcommands[each]) for each in subcommands) if subcommands else [(name, command)]


LEAVES = dict(leaves())


def least_words(command: Any) -> list[str]:
    """Words for what a command requires, of the right types."""
    words: list[str] = []
    for each in command.params:
        if each.required:
            chosen = {"dtype": "float16", "names": "images", "folder": ".", "images": ".", "kind": "frappe"}
            value = (chosen | {"of": "scorer"}).get(each.name, "3")
            words += [value] if each.param_type_name == "argument" else [each.opts[0], value]
    return words


def test_what_can_be_started_is_a_command_or_a_known_program() -> None:
    for name, module in COMMANDS.items():
        assert name == "dask-submit" or isinstance(importlib.import_module(module).app, CommandApp), name
    for module in PROGRAMS - {"tools.settings"}:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


@pytest.mark.long
def test_no_help_loads_a_heavy_library() -> None:
    script = f"""
import contextlib, importlib, io, json, sys
from featurestore.console import commandline
commandline.end_process = sys.exit  # which ends this process too where Arrow is loaded
for line, module in json.loads(sys.argv[1]):
    sys.argv = [*line.split(), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        module = importlib.import_module(module)
        module.main() if line == "dask-submit" else commandline.run_app(module.app)
    assert "Usage" in out.getvalue(), line
    if heavy := [name for name in {HEAVY} if name in sys.modules]:
        sys.exit(f"{{line}} --help loads {{heavy}}")
"""
    lines = [("dask-submit", COMMANDS["dask-submit"]), *((line, COMMANDS[line.split()[0]]) for line in LEAVES)]
    done = ran(sys.executable, "-c", script, json.dumps(lines), cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def check_one_message(words: list[str], text: str) -> None:
    """Check that a line is refused by one message with `text`, before the command begins."""
    called = call(words)
    assert (called.code, called.out, called.trace) == (2, "", ""), (words, called.err)
    assert called.err.startswith("error: ") and called.err.count("\n") == 1, (words, called.err)
    assert text in called.err, (words, called.err)


def kinds_of(annotation: Any) -> set[Any]:
    """Take a type apart: int, float and others in it, also in a list; Literal and Enum for a choice."""
    if get_origin(annotation) is Literal:
        return {Literal}
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return {enum.Enum}
    return {annotation}.union(*map(kinds_of, get_args(annotation)))


WRONG: dict[Any, tuple[str, ...]] = {
    int: ("x", "1.5", "nan", HUGE, f"-{HUGE}"),
    float: ("x", "nan", "inf", "1e400"),
    datetime: ("nan", "2026-02-30"),
    Literal: ("[/x]",),
    enum.Enum: ("[/x]",),
}
"""Values that the type of an option excludes."""


def wrong_values(line: str) -> Iterator[tuple[str, str]]:
    """Yield each option of a command with each value that its type, or its limits, exclude."""
    told = get_params_from_function(LEAVES[line].callback)
    for each in LEAVES[line].params:
        if each.param_type_name != "option" or each.is_flag:
            continue
        about = told[each.name].default
        values = [value for kind in kinds_of(told[each.name].annotation) for value in WRONG.get(kind, ())]
        values += [str(about.min - 1)] if about.min is not None else []
        values += [str(about.max + 1)] if about.max is not None else []
        values += ["3"] if about.callback is power_of_two else []
        yield from ((each.opts[0], value) for value in values)


@pytest.mark.parametrize("line", LEAVES)
def test_a_wrong_option_or_value_and_what_is_required_are_named(line: str) -> None:
    """Not of its type, beyond its limits or 64 bits, not finite, or empty. The help of a job has an example."""
    check_one_message([*line.split(), "--no-such-option", "1", "2"], "option")
    least = least_words(LEAVES[line])
    if least:
        check_one_message(line.split(), "Missing ")
    for option, value in wrong_values(line):
        check_one_message([*line.split(), *least, option, value], option)
    for each in LEAVES[line].params:
        if each.param_type_name == "option" and not each.is_flag:
            check_one_message([*line.split(), *least, each.opts[0], ""], f"{each.opts[0]} is empty")
    if line.startswith("jobs/"):
        called = call([line, "--help"])
        assert called.code == 0 and re.search(r"Examples?:\s+(crossmedia|dask-submit|horovodrun) ", called.out)


def test_values_come_from_all_kinds_of_options() -> None:
    found = {(option, value) for line in LEAVES for option, value in wrong_values(line)}
    assert len(found) > 400
    assert found >= {
        ("--keep-days", "nan"), ("--keep-days", "-1"), ("--port", "65536"),
        ("--dtype", "[/x]"), ("--num-shards", "3"), ("--num-shards", "65537"), ("--seed", HUGE), ("--max-gone", "2"),
    }  # fmt: skip


@pytest.mark.parametrize("line", LEAVES)
def test_a_missing_folder_and_each_option_for_a_file_have_a_line(line: str) -> None:
    """A line of lines.py names a folder that is not there, or one that cannot be made; another one a wrong file."""
    own = [each for each, _, _ in LINES if each.startswith(f"{line} ")]
    place = "{empty}" if line in WRITERS else "{missing}"
    assert line in WITHOUT_PLACES or any(place in each for each in own)
    wrong = [set(each.replace("=", " ").split()) for each in own if any(file in each for file in WRONG_FILES)]
    for option in LEAVES[line].params:
        if option.name in FILES and (line, option.name) not in TOLD_ELSEWHERE:
            assert any(option.param_type_name == "argument" or words & set(option.opts) for words in wrong), option.opts


UNLIMITED = {"--label-threshold", "--seed"}
LARGEST = {"--port": 65535, "--num-shards": 65536, "--bootstrap": 1_000_000}
LARGEST |= dict.fromkeys(("--max-gone", "--min-coverage", "--min-recall"), 1)


@pytest.mark.parametrize("line", LEAVES)
def test_numbers_have_limits(line: str) -> None:
    """The values above come from the limits: one that was lost would not be missed there."""
    told = get_params_from_function(LEAVES[line].callback)
    for each in LEAVES[line].params:
        about, option = told[each.name], each.opts[0]
        if each.param_type_name == "option" and kinds_of(about.annotation) & {int, float}:
            assert about.default.min is not None or option in UNLIMITED, option
            assert about.default.max == LARGEST.get(option, about.default.max), option


@pytest.mark.parametrize("line", LEAVES)
def test_ctrl_c_is_one_line_and_130(line: str) -> None:
    """The signal comes when the command's own function begins."""
    own = inspect.unwrap(LEAVES[line].callback).__code__

    def interrupt(frame: FrameType, event: str, _: Any) -> None:
        if frame.f_code is own:
            raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        called = call([*line.split(), *least_words(LEAVES[line])])
    finally:
        sys.settrace(before)
    assert (called.code, called.trace, called.out) == (130, "", ""), called.err
    assert called.err.startswith("stopped by Ctrl-C") and called.err.count("\n") == 1


def test_ctrl_c_on_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.evaluation.report.evaluate_run", interrupt)
    called = call(["trainer.evaluate", "run"])
    assert (called.code, called.trace, called.err) == (130, "", "stopped by Ctrl-C\n")


@pytest.mark.services
@pytest.mark.parametrize(
    ("words", "made"),
    [
        (["featurestore", "check-backend", "{}/store", "--rounds", "100000"], "store"),
        (["jobs/make_demo_data", "--out", "{}/demo", "--items", "6000"], "demo/images"),
    ],
)
def test_ctrl_c_of_a_terminal(words: list[str], made: str, tmp_path: Path) -> None:
    """As a terminal does it: SIGINT to the process and to all that it has started."""
    command = process_of([word.format(tmp_path) for word in words])
    process = begun(*command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    wait_until((tmp_path / made).exists, lambda: f"{made} is not there", 60, process)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    try:
        out, err = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:  # seen once in some hundred runs: a person presses it again
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert out == "" and [line for line in err.splitlines() if line] == ["stopped by Ctrl-C"]
