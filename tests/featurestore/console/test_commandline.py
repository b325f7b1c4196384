"""What commands print is text, never markup; what was typed wrong is one line and exit code 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.table import Table
from typer.testing import CliRunner

from featurestore.console.commandline import CONTINUES, CommandApp, power_of_two, say_error
from featurestore.console.output import print_table, progress_bars, text_column, text_console
from featurestore.errors import StorageError, StoreNotFoundError
from featurestore.text import one_line, printable

NASTY = ("[/x]", "[bold]", "a[red]b", ":smile:", "[link=http://x]y[/link]")


@pytest.mark.parametrize("text", NASTY)
def test_brackets_are_printed_as_they_are(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(text, title=text)
    table.add_row(text)
    console = text_console()
    console.print(text)
    print_table(console, table)
    assert capsys.readouterr().out.count(text) == 4


@pytest.mark.parametrize("text", NASTY)
def test_a_bars_description_is_no_markup(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for columns in ((), (text_column("{task.fields[text]}"),)):
        with progress_bars(*columns) as progress:
            progress.add_task(text, total=1, text=text)
        assert text in capsys.readouterr().err


def test_a_pipe_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name")
    table.add_row("x" * 300)
    print_table(text_console(), table)
    assert "x" * 300 in capsys.readouterr().out


def test_what_cannot_be_seen_is_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"a\xff\x1b[31m\nb\xe2\x80\xae \xc3\xa9")
    assert printable(name) == "a\\xff\\x1b[31m\\nb\\u202e é"
    text_console().print(name)
    assert capsys.readouterr().out == "a\\xff\\x1b[31m\nb\\u202e é\n"


def test_every_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say_error(ValueError("first\nsecond\x07"))
    say_error(KeyError())
    assert capsys.readouterr().err == "error: first\nsecond\\x07\nerror: KeyError\n"
    assert one_line(ValueError("while parsing\n  in line 1\n\n")) == "while parsing in line 1"


def failing(error: BaseException) -> CommandApp:
    """A command that raises `error`."""
    app = CommandApp(stopped=CONTINUES, failures=(OSError,))

    @app.command()
    def fail() -> None:
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (StorageError("the disk is full"), 1, "error: the disk is full"),
        (StoreNotFoundError("no store at x"), 2, "error: no store at x"),
        (OSError("no space left"), 1, "error: no space left"),
        (MemoryError(), 1, "error: out of memory"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C; what is finished is kept"),
    ],
)
def test_what_ends_a_command_is_one_line_and_a_code(error: BaseException, code: int, words: str) -> None:
    done = CliRunner().invoke(failing(error), [])
    assert done.exit_code == code and done.stdout == ""
    assert done.stderr.startswith(words) and done.stderr.count("\n") == 1


def test_ctrl_c_within_a_wait_for_a_lock_is_ctrl_c() -> None:
    error = RuntimeError("release unlocked lock")
    error.__context__ = KeyboardInterrupt()
    done = CliRunner().invoke(failing(error), [])
    assert done.exit_code == 130 and done.stderr.startswith("stopped by Ctrl-C; what is finished is kept")
    assert isinstance(CliRunner().invoke(failing(RuntimeError("a fault")), []).exception, RuntimeError)


def test_what_is_not_ours_is_left_alone() -> None:
    assert isinstance(CliRunner().invoke(failing(ZeroDivisionError()), []).exception, ZeroDivisionError)


def test_a_note_follows_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    error = StorageError("first")
    error.add_note("second\nthird")
    say_error(error)
    assert capsys.readouterr().err == "error: first\nsecond\nthird\n"


def test_shards_are_a_power_of_two() -> None:
    assert [power_of_two(value) for value in (None, 1, 64)] == [None, 1, 64]
    with pytest.raises(typer.BadParameter, match="3 is not a power of two"):
        power_of_two(3)


def featurestore(*arguments: str | bytes, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, "-m", "featurestore", *arguments],
        capture_output=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_a_usage_error_is_one_line_and_names_the_help() -> None:
    done = featurestore("log", "x", "--last", "0")
    assert done.returncode == 2
    assert done.stderr.decode().startswith("error: Invalid value for '--last'") and done.stderr.count(b"\n") == 1
    assert b"(see python -m featurestore log --help)" in done.stderr


def test_no_command_shows_the_help() -> None:
    done = featurestore()
    assert done.returncode == 2 and b"check-backend" in done.stdout and done.stderr == b""


def test_a_terminal_without_unicode_gets_escapes(tmp_path: Path) -> None:
    done = featurestore("info", str(tmp_path / "é"), PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 2 and b"\\xe9" in done.stderr


def test_a_closed_pipe_is_no_traceback() -> None:
    script = f"{sys.executable} -m featurestore --help | head -c 1"
    done = subprocess.run(script, shell=True, capture_output=True, check=False)
    assert b"Traceback" not in done.stderr
