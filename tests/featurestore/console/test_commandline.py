"""What commands print is text; a wrong line or file is one line and an exit code; what is freed goes back."""

import json
import os
import pickle
import sys
from inspect import getmembers, isclass
from pathlib import Path

import pytest
from rich.table import Table
from typer.testing import CliRunner

from featurestore import errors
from featurestore.__main__ import app
from featurestore.console.commandline import CONTINUES, CommandApp, say_error
from featurestore.console.files import read_tokens, replace_file, replaced_file, write_json, write_json_option
from featurestore.console.output import print_table, progress_bars, text_column, text_console
from featurestore.errors import USAGE, StorageError, StoreNotFoundError, TokenFileError, UserError
from featurestore.problems import Problem
from featurestore.text import one_line, printable
from tests.cli import ran
from tests.raised import compare, raises, told


@pytest.mark.parametrize("text", ["[/x]", "[bold]", "a[red]b", ":smile:", "[link=http://x]y[/link]"])
def test_brackets_are_printed_as_they_are(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(text, title=text)
    table.add_row(text)
    console = text_console()
    console.print(text)
    print_table(console, table)
    assert capsys.readouterr().out.count(text) == 4
    for columns in ((), (text_column("{task.fields[text]}"),)):
        with progress_bars(*columns) as progress:
            progress.add_task(text, total=1, text=text)
        assert text in capsys.readouterr().err


def test_what_cannot_be_seen_is_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"a\xff\x1b[31m\nb\xe2\x80\xae \xc3\xa9")
    assert printable(name) == "a\\xff\\x1b[31m\\nb\\u202e é"
    text_console().print(name)
    assert capsys.readouterr().out == "a\\xff\\x1b[31m\nb\\u202e é\n"


def test_every_mistake_is_one_line_and_its_notes_follow(capsys: pytest.CaptureFixture[str]) -> None:
    error = StorageError("first\nsecond\x07")
    error.add_note("third\nfourth")
    say_error(error)
    say_error(KeyError())
    assert capsys.readouterr().err == "error: first\nsecond\\x07\nthird\nfourth\nerror: KeyError\n"
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


@pytest.mark.parametrize(
    "error",
    [one for _, one in getmembers(errors, isclass) if one.__module__ == errors.__name__ and issubclass(one, Exception)],
)
def test_every_error_has_one_root_stands_in_the_tree_and_pickles(error: type[Exception]) -> None:
    assert issubclass(error, UserError)
    assert error.__name__ in (errors.__doc__ or "")
    copy = pickle.loads(pickle.dumps(error("a message")))
    assert type(copy) is error and str(copy) == "a message"
    compare(pickle.loads(pickle.dumps(error(Problem.NO_PIN, "place", "x", "none"))), Problem.NO_PIN, value="x")


def test_no_command_shows_the_help() -> None:
    done = CliRunner().invoke(app, [])
    assert done.exit_code == 2 and "check-backend" in done.stdout and done.stderr == ""


def test_a_terminal_without_unicode_gets_escapes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = ran(sys.executable, "-m", "featurestore", "info", tmp_path / "é", env=environment)
    assert done.returncode == 2 and "\\xe9" in done.stderr


def test_a_closed_pipe_is_no_traceback() -> None:
    script = f"{sys.executable} -m featurestore --help | head -c 1"
    assert "Traceback" not in ran("sh", "-c", script).stderr


@pytest.mark.parametrize(
    ("content", "problem", "values"),
    [
        (b"", Problem.NO_TOKEN, {}),
        (b"# a comment\n\n", Problem.NO_TOKEN, {}),
        (b"0123456789abcdef\nshort\n", Problem.TOKEN_TOO_SHORT, {"number": 2, "value": 5, "fewest": 16}),
        (b"0123456789abcdef with space\n", Problem.TOKEN_NOT_PLAIN, {"number": 1}),
        (b"0123456789\x01abcdef\n", Problem.TOKEN_NOT_PLAIN, {"number": 1}),
        ("\u00e4".encode() * 20, Problem.TOKENS_NOT_ASCII, {}),
        (None, Problem.NO_TOKEN_FILE, {"reason": "No such file or directory"}),
    ],
)
def test_wrong_files_are_one_line_each(
    tmp_path: Path, content: bytes | None, problem: Problem, values: dict[str, object]
) -> None:
    file = tmp_path / "tokens"
    if content is not None:
        file.write_bytes(content)
    with raises(TokenFileError, problem, where=file, **values) as raised:
        read_tokens(file)
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == USAGE


def test_json_has_null_for_what_is_not_finite_and_nothing_else_is_left_behind(tmp_path: Path) -> None:
    write_json(tmp_path / "demo.json", {"auc": [float("nan"), (0.5, float("inf"))], "gauc": 0.5})
    assert json.loads((tmp_path / "demo.json").read_text()) == {"auc": [None, [0.5, None]], "gauc": 0.5}
    write_json_option(None, {})
    with raises(UserError, Problem.OUTPUT_REFUSED, option="--json", where=tmp_path):
        write_json_option(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]


def test_what_is_not_written_whole_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    replace_file(file, "old")
    with pytest.raises(ValueError, match="half"), replaced_file(file) as part:
        part.write_text("new")
        raise ValueError("half of it")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a.txt", "old")]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match=told(Problem.REPLACES_NO_FILE)):
        replace_file(tmp_path / "pipe", "new")
    assert (tmp_path / "pipe").is_fifo() and sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "pipe"]


LATE = """
import atexit, threading, time
import pyarrow as pa
import typer
from featurestore.console.commandline import CommandApp, run_app

class SlowFile:
    closed = False

    def read(self, size):
        begun.set()
        time.sleep(0.3)
        return b""

class SlowEnd:  # while the interpreter is taken down
    def __del__(self):
        time.sleep(2)

app, begun, end = CommandApp(), threading.Event(), SlowEnd()

@app.command()
def main(code: int) -> None:
    atexit.register(print, "at exit")
    threading.Thread(target=lambda: pa.PythonFile(SlowFile(), "r").read(1), daemon=True).start()
    threading.Thread(target=lambda: (time.sleep(0.1), print("in a thread"))).start()
    begun.wait()
    print("done")
    raise typer.Exit(code)

run_app(app)
"""


@pytest.mark.parametrize("code", [0, 3])
def test_a_read_of_arrow_that_ends_late_does_not_abort_the_command(code: int) -> None:
    """Without `end_process` the thread comes back to Python in the midst of its end, and the code is 134."""
    done = ran(sys.executable, "-c", LATE, code)
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout.splitlines() == ["done", "in a thread", "at exit"]


FREED = """
import re, threading
from pathlib import Path
import numpy as np
import pyarrow as pa
from featurestore.console.memory import bound_freed_memory, return_freed_memory

def taken_mb():
    return int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def work():
    blocks = [np.ones(50_000, np.uint8) for _ in range(400)]
    pools.append(pa.allocate_buffer(1 << 20, resizable=True) and pa.default_memory_pool().backend_name)
    kept.append(blocks[200])

bound_freed_memory(1 << 20)
before, kept, pools = taken_mb(), [], []
for _ in range(4):
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
return_freed_memory()
print(taken_mb() - before, *set(pools))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_of_threads_goes_back_and_arrow_takes_its_own_from_the_same_place() -> None:
    taken_mb, *pools = ran(sys.executable, "-c", FREED).stdout.split()
    assert float(taken_mb) < 15, "320 MB were taken, 20 MB of them at once"
    assert pools == ["system"]
