"""Fuzz the parsers of files and bodies, or find out which planted bugs the inputs notice."""

import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from tests.fuzz.parsers import PARSERS, Parser
from tests.fuzz.planted import BUGS
from tests.fuzz.run import fuzz
from tests.planted import Bug, hunt

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
Examples = Annotated[int, typer.Option(min=1, help="Inputs for each parser; of planted bugs the most for each.")]
First = Annotated[int, typer.Option(min=0, help="Seed of the inputs.")]
Only = Annotated[str, typer.Option(metavar="TEXT", help="Only parsers that have this text in their names.")]


@app.command(epilog="Example: python -m tests.fuzz play --examples 5000 --only request")
def play(examples: Examples = 2000, first: First = 0, only: Only = "") -> None:
    """Run each parser on its inputs in a process of its own; exit 1 where one breaks the rule."""
    broken = 0
    for parser in (each for each in PARSERS if only in each.name):
        begin_s = time.monotonic()
        values, finding = _in_process(_played, parser.name, examples, first) or (0, "the process ended")
        broken += bool(finding)
        rate = f"{examples / (time.monotonic() - begin_s):6.0f} inputs/s, {values:6} with a value"
        print(f"{parser.name:15} {(finding and f'BREAKS THE RULE: {finding[:200]}') or rate}", flush=True)
    print(f"{broken} parsers break the rule; {sum(os.times()[:4]):.0f} s of a processor")
    raise typer.Exit(broken > 0)


@app.command(epilog="Example: python -m tests.fuzz bugs --only csv")
def bugs(examples: Examples = 1000, first: First = 0, only: Only = "") -> None:
    """Plant bugs, one at a time, and run their parsers until an input notices each; exit 1 where none does."""

    def noticed(bug: Bug) -> str:
        found = _in_process(_why, bug.kind, examples, first)
        return "the process ended" if found is None else str(found)

    hunt([bug for bug in BUGS if only in bug.kind], noticed)


@app.command(epilog="Example: python -m tests.fuzz guided --only request --examples 50000")
def guided(examples: Examples = 2000, first: First = 0, only: Only = "") -> None:
    """Run each parser on inputs that atheris changes further where they reach new branches; exit 1 as play does.

    What breaks the rule is left as a file PARSER-crash-DIGEST in the working folder. It needs `pip install atheris`."""
    broken = 0
    for parser in (each for each in PARSERS if only in each.name):
        with TemporaryDirectory() as folder:
            options = [f"-runs={examples}", f"-seed={first + 1}", f"-artifact_prefix={parser.name.replace(' ', '-')}-"]
            command = [sys.executable, "-m", "tests.fuzz.guided", parser.name, folder, *options]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        broken += run.returncode != 0
        said = re.findall(r".*(?:DONE|Error|ERROR|Test unit).*", run.stderr) or [run.stderr[-300:]]
        print(f"{parser.name:15} {'BREAKS THE RULE: ' * (run.returncode != 0)}{' '.join(said)[:300]}", flush=True)
    print(f"{broken} parsers break the rule; {sum(os.times()[:4]):.0f} s of a processor")
    raise typer.Exit(broken > 0)


def named(name: str) -> Parser:
    """Find a parser. Raises StopIteration."""
    return next(each for each in PARSERS if each.name == name)


def _in_process(work: Callable[..., Any], *given: Any) -> Any:
    """Call in a forked process, which a parser may crash: None then."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=lambda: sender.send(work(*given)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        process.join()


def _played(name: str, examples: int, first: int) -> tuple[int, str]:
    values, finding = fuzz(named(name), examples, first, shrink=True)
    return values, f"{finding.why}; {finding.data[:60]!r} ({len(finding.data)} bytes)" if finding else ""


def _why(name: str, examples: int, first: int) -> str:
    """Return how a parser breaks the rule; empty where it keeps it."""
    finding = fuzz(named(name), examples, first)[1]
    return finding.why if finding else ""


if __name__ == "__main__":
    app()
