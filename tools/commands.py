"""Write docs/COMMANDS.md, every command with its arguments and examples, from what the commands say in their --help.

python tools/commands.py            write the page
python tools/commands.py --check    write nothing; exit 1 where the page is not what the commands say
"""

import importlib
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import Any

import click
from typer.main import get_command

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # benchmarks and jobs are not installed everywhere that this runs
PAGE = ROOT / "docs" / "COMMANDS.md"
PARTS = {
    "jobs": "Jobs",
    "featurestore": "The store",
    "trainer": "The trainer",
    "serving": "Serving",
    "explorer": "Explorer",
    "benchmarks": "Benchmarks",
}
OF_OTHERS = ("worker.py", "peer.py")  # programs that other programs start
COMMAND_LINE = re.compile("`?(python|dask-submit|dask|horovodrun|torchrun) ")
HEAD = """# Commands

Written by `python tools/commands.py` from the commands' own help; `make lint` checks it. Jobs also run under
`dask-submit` (on several processes or machines), and the trainer's commands on P ranks: `horovodrun -np P python -m …`
or `torchrun --nproc-per-node P -m …` ([TORCHRUN.md](TORCHRUN.md)).
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
    """Return the words by which a person starts the command of a file."""
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


def row(parameter: Any, context: click.Context) -> str | None:
    """Write a parameter as a row of a table: its names, what it takes, and what it says. None for --help."""
    record = parameter.get_help_record(context)
    if record is None or "--help" in parameter.opts:
        return None
    names, text = record
    choices = re.search(r" [<\[]([\w.-]+(?:\|[\w.-]+)+)[>\]]$", names)
    names = re.sub(r" [<\[].*[>\]]$| [A-Z]+ RANGE$", "", names) if parameter.metavar is None or choices else names
    names = re.sub(r" <[^>]*>$", "", names) + (f" {choices[1]}" if choices else "")
    text = re.sub(r"\[default: \((.*?)\)(?=[;\]])", r"[default: \1", re.sub("  +", " ", text))
    return "| `{}` | {} |".format(*(each.replace("|", "\\|") for each in (names, text)))


def described(title: str, command: Any, context: click.Context, level: str) -> Iterator[str]:
    """Yield the section of a command, and those of its subcommands."""
    yield f"{level} `{title}`\n"
    yield from blocks(command.help or "")
    rows = [made for parameter in command.get_params(context) if (made := row(parameter, context))]
    if rows:
        yield "\n".join(["| | |", "|---|---|", *rows, ""])
    yield from blocks(command.epilog or "")
    for name, each in getattr(command, "commands", {}).items():
        yield from described(f"{title} {name}", each, click.Context(each, context, name), level + "#")


def page() -> str:
    """Write the whole page."""
    sections: list[str] = [HEAD]
    for part, title in PARTS.items():
        sections.append(f"## {title}\n")
        commands: Iterable[tuple[str, Any]] = (
            (name_of(path), get_command(importlib.import_module(".".join(path.with_suffix("").parts)).app))
            for path in command_files(part)
        )
        for name, command in commands:
            sections += described(name, command, click.Context(command, info_name=name), "###")
        if part == "jobs":
            from pipeline.cluster.submit import submit

            sections += described("dask-submit", submit, click.Context(submit, info_name="dask-submit"), "###")
    return "\n".join(sections)


def main() -> int:
    """Write or check the page and return the exit code."""
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print("docs/COMMANDS.md is not what the commands say: run python tools/commands.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
