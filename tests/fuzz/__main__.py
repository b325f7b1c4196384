"""Fuzz the parsers of files and bodies, or find out which planted bugs the inputs notice."""

import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from tests.fuzz.parsers import PARSERS, Parser, named
from tests.fuzz.planted import BUGS
from tests.fuzz.run import Finding, fuzz
from tests.planted import Bug, hunt

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
Examples = Annotated[int, typer.Option(min=1, help="Inputs for each parser; of planted bugs the most for each.")]
First = Annotated[int, typer.Option(min=0, help="Seed of the inputs.")]
Only = Annotated[str, typer.Option(metavar="TEXT", help="Only parsers that have this text in their names.")]


@app.command(epilog="Example: python -m tests.fuzz play --examples 5000 --only request")
def play(examples: Examples = 2000, first: First = 0, only: Only = "") -> None:
    """Run each parser on its inputs in a process of its own; exit 1 where one breaks the rule.

    The input that does is left as data/fuzz/PARSER-finding, empty where the process ended."""

    def played(parser: Parser) -> tuple[bool, str]:
        begin_s = time.monotonic()
        values, finding = _in_process(parser, examples, first)
        if finding:
            file = Path(f"data/fuzz/{parser.name.replace(' ', '-')}-finding")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(finding.data)
            return True, f"{finding.why}; {file}"
        return False, f"{examples / (time.monotonic() - begin_s):6.0f} inputs/s, {values:6} with a value"

    _each(only, played)


@app.command(epilog="Example: python -m tests.fuzz bugs --only csv")
def bugs(examples: Examples = 1000, first: First = 0, only: Only = "") -> None:
    """Plant bugs, one at a time, and run their parsers until an input notices each; exit 1 where none does."""

    def noticed(bug: Bug) -> str:
        _, finding = _in_process(named(bug.kind), examples, first)
        return finding.why if finding else ""

    hunt([bug for bug in BUGS if only in bug.kind], noticed)


@app.command(epilog="Example: python -m tests.fuzz guided --only request --examples 50000")
def guided(examples: Examples = 2000, first: First = 0, only: Only = "") -> None:
    """Run each parser on inputs that atheris changes further where they reach new branches; exit 1 as play does.

    What breaks the rule is left as a file PARSER-crash-DIGEST in the working folder. It needs `pip install atheris`."""

    def played(parser: Parser) -> tuple[bool, str]:
        with TemporaryDirectory() as folder:
            options = [f"-runs={examples}", f"-seed={first + 1}", f"-artifact_prefix={parser.name.replace(' ', '-')}-"]
            command = [sys.executable, "-m", "tests.fuzz.guided", parser.name, folder, *options]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        said = re.findall(r".*(?:DONE|Error|ERROR|Test unit).*", run.stderr) or [run.stderr[-300:]]
        return run.returncode != 0, " ".join(said)

    _each(only, played)


def _each(only: str, play: Callable[[Parser], tuple[bool, str]]) -> None:
    """Print of each parser what a play of it says; exit 1 where one breaks the rule."""
    broken = 0
    for parser in (each for each in PARSERS if only in each.name):
        is_broken, said = play(parser)
        broken += is_broken
        print(f"{parser.name:15} {'BREAKS THE RULE: ' * is_broken}{said[:300]}", flush=True)
    print(f"{broken} parsers break the rule; {sum(os.times()[:4]):.0f} s of a processor")
    raise typer.Exit(broken > 0)


def _in_process(parser: Parser, examples: int, first: int) -> tuple[int, Finding | None]:
    """Fuzz in a forked process, which a parser may crash."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    work = multiprocessing.get_context("fork").Process(target=lambda: sender.send(fuzz(parser, examples, first)))
    work.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return 0, Finding(b"", "the process ended")
    finally:
        work.join()


if __name__ == "__main__":
    app()
