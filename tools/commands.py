"""The page COMMANDS of the site: every command with its arguments and examples, from its --help."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import Any

import click
from typer.main import get_command

from crossmedia.command import ENTRIES, GROUPS, PROGRAM, load
from featurestore.console.commandline import help_blocks
from pipeline.cluster.submit import submit
from tools.tables import table

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    "crossmedia": "The demo",
    "jobs": "Jobs",
    "featurestore": "The store",
    "trainer": "The trainer",
    "serving": "Serving",
    "explorer": "Explorer",
    "benchmarks": "Benchmarks",
}
OF_OTHERS = ("worker.py", "peer.py", "rivals.py")  # programs that other programs start
HEAD = """# Commands

Every command with its options, as its `--help` has them. Those that compute on Dask run on a cluster by `-n` or
`--scheduler`, or under `dask-submit`; those of the trainer run on P ranks: `horovodrun -np P crossmedia …` or
`torchrun --nproc-per-node P -m crossmedia …`. Where `crossmedia` is not on the path, use `python -m crossmedia`.
Exit codes: 0 done, 1 failed or found a problem, 2 the command line is wrong or names something that is not there, 130
stopped by a signal.
"""


def command_files(part: str) -> list[Path]:
    """List the files of a package that are commands, relative to the root."""
    files = sorted((ROOT / part).rglob("*.py"))
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.name not in OF_OTHERS}
    found = [path for path, text in texts.items() if '__name__ == "__main__"' in text and "\napp = " in text]
    return [path.relative_to(ROOT) for path in found]


def name_of(path: Path) -> str:
    """Return the words that start the command of a file."""
    if path.parts[0] == "jobs":
        return f"python {path}"
    return "python -m " + ".".join(path.with_suffix("").parts).removesuffix(".__main__")


def blocks(text: str) -> Iterator[str]:
    """Yield a help text as Markdown: paragraphs, and the command lines between them as blocks of code."""
    for is_code, texts in help_blocks(text):
        yield (
            "\n".join(["```", *texts, "```", ""]) if is_code else "\n\n".join(fill(text, 125) for text in texts) + "\n"
        )


def row(parameter: Any, context: click.Context) -> tuple[str, str] | None:
    """Return the names of a parameter with its type, and its help; None for --help."""
    record = parameter.get_help_record(context)
    if record is None or "--help" in parameter.opts:
        return None
    names, text = (re.sub(" +", " ", each) for each in record)
    text = re.sub(r"\[default: \((.*?)\)(?=[;\]])", r"[default: \1", text)
    names = re.sub(r" <(?!\w+\|)[^>]*>$", "", names)  # types are left out, choices stay
    return f"`{names}`", text


def described(title: str, command: Any, context: click.Context, level: str) -> Iterator[str]:
    """Yield the section of a command, and those of its subcommands."""
    yield f"{level} `{title}`\n"
    yield from blocks(command.help or "")
    yield table(("", ""), filter(None, (row(parameter, context) for parameter in command.get_params(context))))
    yield from blocks(command.epilog or "")
    for name, each in getattr(command, "commands", {}).items():
        yield from described(f"{title} {name}", each, click.Context(each, context, name), level + "#")


def commands_of(part: str) -> dict[str, Any]:
    """Return the commands of a package by the words that start them."""
    modules = {name_of(path): ".".join(path.with_suffix("").parts) for path in command_files(part)}
    found = {name: get_command(importlib.import_module(module).app) for name, module in modules.items()}
    return found | ({"dask-submit": submit} if part == "jobs" else {})


def sections() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the title of each section of the page, and its commands by the words that start them."""
    for title, entries in GROUPS.items():
        yield title, {f"{PROGRAM} {name}": load(name) for name in entries}
    yield "Dask clusters", {"dask-submit": submit}
    yield PARTS["benchmarks"], commands_of("benchmarks")


def alone(name: str) -> Iterator[str]:
    """Yield the sentence on how the modules of a command are started without the command crossmedia."""
    modules = ENTRIES[name].modules if name in ENTRIES else ()
    if found := [f"`{name_of(Path(module.replace('.', '/') + '.py'))}`" for module in modules]:
        yield f"The same: {', '.join(found)}.\n"


def page() -> str:
    """Write the whole page."""
    parts = [HEAD]
    for title, commands in sections():
        parts.append(f"## {title}\n")
        for name, command in commands.items():
            parts += described(name, command, click.Context(command, info_name=name), "###")
            parts += alone(name.removeprefix(f"{PROGRAM} "))
    return "\n".join(parts)
