"""Help texts of commands: their examples are not wrapped, so that they can be copied."""

import re
import shutil
from collections.abc import Iterator
from itertools import groupby
from textwrap import fill
from typing import Any

from typer.core import TyperCommand, TyperGroup

COMMAND_LINE = re.compile("`?(crossmedia|python|dask-submit|dask|horovodrun|torchrun|srun) ")
_MOST_COLUMNS, _LEAST_COLUMNS = 120, 40


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
