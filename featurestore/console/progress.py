"""How far a job is: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn

from featurestore.console.output import progress_bars, text_column, text_console

LINE_EVERY_S = 10.0

Advance = Callable[[int], None]


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Gives a function that takes how many of `total` were finished since its last call. Writes to stderr.

    Nothing to do is nothing to show.
    """
    if not total:
        yield lambda count: None
        return
    console = text_console(stderr=True)
    if not console.is_terminal:
        yield _lines(title, total, done)
        return
    columns = (text_column(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with progress_bars(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def _lines(title: str, total: int, done: int) -> Advance:
    state = {"done": done, "shown_s": time.monotonic()}

    def advance(count: int) -> None:
        state["done"] += count
        now_s = time.monotonic()
        if now_s - state["shown_s"] >= LINE_EVERY_S or state["done"] >= total:
            state["shown_s"] = now_s
            print(f"{title}: {state['done']:,} of {total:,}", file=sys.stderr, flush=True)

    return advance
