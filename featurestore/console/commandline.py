"""Start and end of every command: its help, checks of arguments, and one line for each error.

Exit codes:
0    done
1    something went wrong, or a check has found a problem: a file is damaged, of another kind or cannot be written, the
     disk is full, a server does not answer
2    what was typed is wrong, here or in a file of settings: an option is unknown or out of range, does not go with
     another, or names what is not there: a store, a snapshot, a run, a checkpoint, a folder, or one with nothing of the
     kind in it
130  stopped by Ctrl-C or another signal
"""

import atexit
import errno
import functools
import gc
import inspect
import io
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import Any, NoReturn, TypeVar, cast, get_type_hints

import click
import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command
from typer.models import ParameterInfo

from featurestore.console.page import takes_page
from featurestore.errors import FAILED, USAGE, UserError
from featurestore.problems import Problem
from featurestore.text import one_line, printable, refusal

Options = TypeVar("Options")

OK, STOPPED = 0, 130
STOPPED_BY_USER = "stopped by Ctrl-C"
CONTINUES = f"{STOPPED_BY_USER}; what is finished is kept: run the same command again to continue"
INT64 = range(-(2**63), 2**63)  # as all whole numbers in files
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # Path makes one slash of two
_OBJECTS_BETWEEN_COLLECTIONS = 50_000  # by Python's 700 it looks at what imports make, and keep, for a tenth of a start

# typer brings a click of its own, and says nowhere what the roots of its errors are called.
USAGE_ERROR = cast("type[click.UsageError]", typer.BadParameter.__mro__[1])
_ROOT_ERROR = cast("type[click.ClickException]", typer.BadParameter.__mro__[2])
_HELP_INSTEAD = "NoArgsIsHelpError"
COMMAND_LINE = re.compile("`?(crossmedia|python|dask-submit|dask|horovodrun|torchrun|srun) ")
_MOST_COLUMNS, _LEAST_COLUMNS = 120, 40


class Command(TyperCommand):
    """A command whose examples are not wrapped."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        format_help(self, super().format_help, ctx, formatter)


class CommandGroup(TyperGroup):
    """A group of commands whose examples are not wrapped."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        format_help(self, super().format_help, ctx, formatter)


class CommandApp(typer.Typer):
    """A Typer app whose commands end with one line and an exit code instead of a traceback, see `command_end`.

    `stopped` is the line for Ctrl-C; `failures` are classes of errors that are not ours and get a line as well;
    `report`: the commands take --html FILE, which gets what they print; `on_ranks`: they hand their work to
    run_on_ranks, which has rank 0 write that file; `completion`: the app has options that let the shell complete its
    commands.
    """

    def __init__(
        self,
        *,
        stopped: str = STOPPED_BY_USER,
        failures: tuple[type[Exception], ...] = (),
        report: bool = False,
        on_ranks: bool = False,
        completion: bool = False,
        **options: Any,
    ) -> None:
        options = {"cls": CommandGroup, **options}
        super().__init__(add_completion=completion, pretty_exceptions_enable=False, **options)
        self._stopped, self._failures = stopped, failures
        self._report, self._on_ranks = report, on_ranks

    def command(self, *names: Any, findings: bool = False, **options: Any) -> Callable[[Any], Any]:
        """Add a function to the commands, as Typer does; the function itself stays as it is.

        `findings`: the command takes --html FILE, and writes it also where it ends with 1, as it has found something.
        """
        add = super().command(*names, **{"cls": Command, **options})

        def added(function: Any) -> Any:
            called = function
            if self._report or findings:
                called = takes_page(function, on_ranks=self._on_ranks, with_findings=findings)

            @functools.wraps(called)
            def ended(*args: Any, **values: Any) -> Any:
                with command_end(self._stopped, self._failures):
                    return called(*args, **values)

            add(ended)
            return function

        return added


@contextmanager
def command_end(stopped: str = STOPPED_BY_USER, failures: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn an error of ours, one of `failures`, a lack of memory or Ctrl-C into one line on stderr and typer.Exit.

    So is a file that the system refuses, e.g. as its name is too long; one that is not there is not expected here.
    """
    ours: tuple[type[Exception], ...] = (UserError, *failures)
    try:
        yield
    except ours as error:
        say_error(error)
        raise typer.Exit(getattr(error, "exit_code", FAILED)) from error
    except MemoryError as error:
        say_error("out of memory: this machine has too little for this command, or other programs take it")
        raise typer.Exit(FAILED) from error
    except OSError as error:
        if not isinstance(error.filename, str) or error.errno == errno.ENOENT:
            raise
        say_error(f"{error.filename}: {refusal(error)}")
        raise typer.Exit(FAILED) from error
    except (KeyboardInterrupt, RuntimeError) as error:
        if not _is_interrupt(error):
            raise
        typer.echo(stopped, err=True)
        raise typer.Exit(STOPPED) from None


def _is_interrupt(error: BaseException | None) -> bool:
    """Tell Ctrl-C from other errors; of one in a wait for a lock Python makes RuntimeError("release unlocked lock")."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def run_app(app: CommandApp, prog: str | None = None) -> NoReturn:
    """Run a command with this process's arguments, and exit with its code. `prog`: its name in messages.

    A wrong argument is one line on stderr, `error: ...`, and exit code 2.
    """
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that this terminal cannot show is spelled out
            stream.reconfigure(errors="backslashreplace")
    _check_not_empty(sys.argv[1:])
    command = command_of(app)
    try:
        with command_end():  # of what is checked before the command's own function begins
            code = command.main(None, prog, standalone_mode=False)
    except _ROOT_ERROR as error:
        code = report_usage(error)
    except typer.Exit as end:
        code = end.exit_code
    except typer.Abort:
        code = STOPPED
    end_process(code if isinstance(code, int) else OK)


def end_process(code: int) -> NoReturn:
    """End the process with a code, as sys.exit does; where Arrow is loaded, without taking the interpreter down.

    A thread of Arrow may drop what it has read only after the read has returned. If that is while the interpreter is
    taken down, it aborts the process (code 134, "terminate called without an active exception") or waits for ever:
    https://github.com/apache/arrow/issues/34314, /50482.
    """
    if "pyarrow" not in sys.modules:
        sys.exit(code)
    with suppress(KeyboardInterrupt):  # wait for threads, then call exit functions, as Python does
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # a pipe that nobody reads: Python has a line and a code for it
        sys.exit(code)
    os._exit(code)


def command_of(app: CommandApp) -> click.Command:
    """Make the click command of an app; its numbers are checked."""
    command = cast("click.Command", get_command(app))
    _check_numbers_of(command)
    return command


def report_usage(error: click.ClickException) -> int:
    """Print a mistake in the arguments as one line, or the help where no argument was given; returns the exit code."""
    message = error.format_message()
    if type(error).__name__ == _HELP_INSTEAD:
        sys.stderr.write(f"{message}\n" if message.strip() else "")
    elif isinstance(error, USAGE_ERROR | click.UsageError) and error.ctx is not None:
        say_error(f"{one_line(message)} (see {error.ctx.command_path} {error.ctx.help_option_names[-1]})")
    else:
        say_error(one_line(message))
    return error.exit_code


def say_error(error: Exception | str) -> None:
    """Print an error on stderr after `error: `, one line for one mistake, then the error's notes."""
    lines = str(error).splitlines() or [type(error).__name__]
    lines += [line for note in getattr(error, "__notes__", ()) for line in note.splitlines()]
    sys.stderr.write("error: " + "".join(f"{printable(line)}\n" for line in lines))
    sys.stderr.flush()


def on_this_machine(folder: Path) -> Path:
    """Check an option that names a folder to write on this machine. Raises typer.BadParameter for an address."""
    if _ADDRESS.match(str(folder)):
        raise typer.BadParameter(Problem.IS_AN_ADDRESS.of(str(folder).replace(":/", "://", 1)))
    return folder


def power_of_two(value: int | None) -> int | None:
    """Check an option that counts shards, and return its value. Raises typer.BadParameter."""
    if value is not None and value & (value - 1):
        raise typer.BadParameter(Problem.NOT_A_POWER_OF_TWO.of(value))
    return value


def takes(kind: Callable[..., Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Make a command of a function of one object: its options are the fields of the dataclass `kind` with a help."""
    hints = {
        name: hint
        for name, hint in get_type_hints(kind, include_extras=True).items()
        if any(isinstance(about, ParameterInfo) for about in getattr(hint, "__metadata__", ()))
    }
    defaults = {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if defaults[name] is MISSING else defaults[name],
            annotation=hint,
        )
        for name, hint in hints.items()
    ]

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            function(kind(**values))

        command.__name__, command.__doc__, command.__annotations__ = function.__name__, function.__doc__, hints
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def _check_not_empty(arguments: Sequence[str]) -> None:
    """Exit with code 2 where an argument is empty, e.g. from a variable that is not set.

    So no command has to check it: an empty path would be the current folder.
    """
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument == "" or (argument.startswith("--") and argument.endswith("=")):
            name = argument.rstrip("=") or before
            where = f"the value of {name}" if name.startswith("-") else "an argument"
            say_error(f"{where} is empty: give it a value, or leave it out")
            sys.exit(USAGE)


def _check_numbers_of(command: click.Command) -> None:
    """Let every option check that its number is finite and, if whole, fits into 64 bits, before its own limits."""
    for each in _commands(command):
        for parameter in each.params:
            parameter.callback = _number_check(parameter.callback)


def _commands(command: click.Command) -> Iterator[click.Command]:
    yield command
    for each in getattr(command, "commands", {}).values():
        yield from _commands(each)


def _number_check(then: Callable[..., Any] | None) -> Callable[..., Any]:
    """Return a parameter's callback that checks its value, or each of its values, and continues with `then`."""

    def check(context: Any, parameter: Any, value: Any) -> Any:
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, float) and not math.isfinite(each):
                raise typer.BadParameter(Problem.NOT_FINITE.of(each), ctx=context, param=parameter)
            if isinstance(each, int) and each not in INT64:
                raise typer.BadParameter(Problem.BEYOND_INT64.of(each), ctx=context, param=parameter)
        return value if then is None else then(context, parameter, value)

    return check


def help_blocks(text: str) -> Iterator[tuple[bool, list[str]]]:
    """Yield the blocks of a text of help: whether it is command lines, and its lines or whole paragraphs.

    Command lines are those of a paragraph that has one; the words Example and Examples before them are left out.
    """
    parts: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.replace("\b", "")):
        lines = [re.sub(r"^(- |Examples?:\s*)", "", line.strip()) for line in paragraph.splitlines()]
        is_code = any(COMMAND_LINE.match(line) for line in lines)
        parts += [line.strip("`") for line in lines] if is_code else [" ".join(lines).strip()]
    for is_code, group in groupby(filter(None, parts), lambda part: bool(COMMAND_LINE.match(part))):
        yield is_code, list(group)


def end_of_help(text: str) -> str:
    """Write the last part of a help for a terminal: paragraphs in its width, and each command on one line."""
    columns = max(_LEAST_COLUMNS, min(_MOST_COLUMNS, shutil.get_terminal_size().columns)) - 2
    written = []
    for is_code, parts in help_blocks(text):
        if is_code:
            written.append(
                "\n".join([" Examples:" if len(parts) > 1 else " Example:", "", *(f"  {each}" for each in parts)])
            )
        else:
            written += [fill(each, columns, initial_indent=" ", subsequent_indent=" ") for each in parts]
    return "\n\n".join(written)


def format_help(command: TyperCommand | TyperGroup, write: Any, context: Any, formatter: Any) -> None:
    """Write a help by `write`, typer's own way, but for its last part (`end_of_help`)."""
    epilog, command.epilog = command.epilog, None
    try:
        write(context, formatter)
    finally:
        command.epilog = epilog
    if epilog:
        formatter.write(end_of_help(epilog) + "\n")
