"""Tables of the generated pages, as Markdown."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table, with a newline at its end; an empty text without rows."""
    cells = [head, ["---"] * len(head), *rows]
    if len(cells) == 2:
        return ""
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in cells)
