"""The page COMMANDS of the site: every command with its arguments and examples, from its --help."""

import importlib
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import Any

import click
from typer.main import get_command

from pipeline.cluster.submit import submit
from tools.tables import table

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    "jobs": "Jobs",
    "featurestore": "The store",
    "trainer": "The trainer",
    "serving": "Serving",
    "explorer": "Explorer",
    "benchmarks": "Benchmarks",
}
OF_OTHERS = ("worker.py", "peer.py", "rivals.py")  # programs that other programs start
COMMAND_LINE = re.compile("`?(python|dask-submit|dask|horovodrun|torchrun) ")
HEAD = """# Commands

Every command with its options, as its `--help` has them. Jobs also run under `dask-submit` (on several processes or
machines), and the trainer's commands on P ranks: `horovodrun -np P python -m …` or `torchrun --nproc-per-node P -m …`.
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
    parts: list[str] = []  # whole paragraphs, and single lines of code
    for paragraph in re.split(r"\n\s*\n", text.replace("\b", "")):
        lines = [re.sub(r"^(- |Examples?:\s*)", "", line.strip()) for line in paragraph.splitlines()]
        is_code = any(COMMAND_LINE.match(line) for line in lines)
        parts += [line.strip("`") for line in lines] if is_code else [" ".join(lines).strip()]
    for is_code, group in groupby(filter(None, parts), lambda part: bool(COMMAND_LINE.match(part))):
        texts = list(group)
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


def page() -> str:
    """Write the whole page."""
    sections = [HEAD]
    for part, title in PARTS.items():
        sections.append(f"## {title}\n")
        for name, command in commands_of(part).items():
            sections += described(name, command, click.Context(command, info_name=name), "###")
    return "\n".join(sections)
