"""Progress of a command: a bar on a terminal, a line every 10 seconds in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn, TimeRemainingColumn

from featurestore.console.output import progress_bars, text_column, text_console

LINE_EVERY_S = 10.0


class ProgressBar:
    """A progress bar: `advance` it by what was finished since the last call, or call it with all that is finished."""

    def __init__(self, bars: Progress, title: str, total: int, done: int) -> None:
        self._bars, self._title, self._total, self._done = bars, title, total, done
        self._task: TaskID | None = None
        self._started_s = self._shown_s = time.monotonic()

    def advance(self, count: int) -> None:
        """Show `count` more of the total."""
        self(self._done + count, self._total)

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` are finished."""
        if self._bars.disable:
            self._print_line(done, total)
        elif self._task is None:
            self._task = self._bars.add_task(self._title, total=total, completed=done)
        else:
            self._bars.update(self._task, description=self._title, completed=done, total=total)
        self._done, self._total = done, total

    def doing(self, what: str) -> None:
        """Show what is being done, in the place of the title until the next number; in a log every 10 s."""
        if not self._bars.disable:
            if self._task is not None:
                self._bars.update(self._task, description=what)
        elif time.monotonic() - self._shown_s >= LINE_EVERY_S:
            self._shown_s = time.monotonic()
            print(f"{self._title}: {what}", file=sys.stderr, flush=True)

    def _print_line(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        if now_s - self._shown_s >= LINE_EVERY_S or (done >= total > self._done and self._shown_s > self._started_s):
            self._shown_s = now_s
            print(f"{self._title}: {done:,} of {total:,}", file=sys.stderr, flush=True)


@contextmanager
def progress_bar(title: str, total: int = 0, done: int = 0) -> Iterator[ProgressBar]:
    """Show progress on stderr: a bar until the end of the block; in a log a line every 10 s, none for quick work."""
    console = text_console(stderr=True)
    columns = (text_column(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with progress_bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield ProgressBar(bars, title, total, done)
