"""Commands called in this process, and programs called in others."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import typer
from typer.testing import CliRunner, Result

T = TypeVar("T")


def ran(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; return its exit code and its output, as text."""
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, **options)


def begun(*words: object, **options: Any) -> subprocess.Popen[str]:
    """Start a program in a process group of its own, with pipes for its output, as text."""
    pipe = subprocess.PIPE
    return subprocess.Popen(list(map(str, words)), stdout=pipe, stderr=pipe, text=True, process_group=0, **options)


def wait_until(
    holds: Callable[[], T],
    said: Callable[[], str],
    timeout_s: float = 20,
    job: "subprocess.Popen[bytes] | subprocess.Popen[str] | None" = None,
    pause_s: float = 0.05,
) -> T:
    """Return what holds, once it does; fail with what was said where the time is over, or `job` has ended before."""
    end_s = time.monotonic() + timeout_s
    while not (found := holds()):
        assert (job is None or job.poll() is None) and time.monotonic() < end_s, said()
        time.sleep(pause_s)
    return found


def invoke(app: typer.Typer, *words: object, code: int | None = None) -> Result:
    """Call an app in this process; it has to end with `code`, where one is given."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert code is None or result.exit_code == code, result.output
    assert not code or isinstance(result.exception, SystemExit), "no traceback"
    return result


def printed(app: typer.Typer, *words: object) -> str:
    """Call an app, which has to end well; return what it prints to stdout."""
    return invoke(app, *words, code=0).stdout


def said(app: typer.Typer, *words: object, code: int = 0) -> str:
    """Call an app as `invoke` does; return all that it prints, in one line and without frames."""
    return " ".join(invoke(app, *words, code=code).output.replace("│", " ").split())


def figures_of(app: typer.Typer, folder: Path, *words: object) -> dict[str, Any]:
    """Call an app, which has to end well; return the figures that it writes by --json, into a file of the folder."""
    invoke(app, *words, "--json", folder / "figures.json", code=0)
    found: dict[str, Any] = json.loads((folder / "figures.json").read_text())
    return found
