"""What a person sees of a run: a progress bar where there is a terminal, else plain lines; and TensorBoard's files."""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

from featurestore.console.output import figure, print_warning, progress_bars, text_column, text_console
from trainer.loop.events import EventsFile

_LINE_EVERY_S = 5.0
TENSORBOARD = "tensorboard"
"""The folder of a run that has TensorBoard's files."""


class ProgressLog:
    """Rank 0's log of a run of `total` steps. Without a folder (other ranks) it says and writes nothing."""

    def __init__(self, folder: Path | None, first_step: int, total: int) -> None:
        self.console = text_console(quiet=folder is None)
        self._total = total
        self._events = EventsFile(folder / TENSORBOARD, first_step) if folder else None
        self.warned: set[str] = set()
        """What a warning was printed about."""
        self._next_line_s = 0.0
        self._bar = progress_bars(
            text_column(),
            BarColumn(),
            MofNCompleteColumn(),
            text_column("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=folder is None or not self.console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total, completed=first_step, text="")

    def __enter__(self) -> "ProgressLog":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, step: int, scalars: Mapping[str, float], details: Mapping[str, float]) -> None:
        """Show step number `step`; where there are `details`, these and `scalars` go to TensorBoard."""
        text = "  ".join(f"{name} {figure(value)}" for name, value in scalars.items())
        self._bar.update(self._task, completed=step, text=text)
        if details:
            self.details(step, {**{f"train/{name}": value for name, value in scalars.items()}, **details})
        if self._bar.disable and (step == self._total or time.monotonic() >= self._next_line_s):
            self._next_line_s = time.monotonic() + _LINE_EVERY_S
            self.say(f"step {step}/{self._total}  {text}")

    def metrics(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Show an evaluation at `step`; a metric that is not defined is printed as such, and not drawn."""
        names = ("logloss", "auc", "gauc", "new_ad_auc")
        text = "  ".join(f"{n} {'undefined' if metrics[n] is None else format(metrics[n], '.4f')}" for n in names)
        self.say(f"step {step}  test: {text}")
        self.details(step, {f"test/{name}": value for name, value in metrics.items()})

    def details(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Write values for TensorBoard alone; one that is not defined is not drawn."""
        drawn = {name: value for name, value in values.items() if value is not None}
        if self._events and drawn and (failure := self._events.add(step, drawn)):
            self.warn("events", f"figures for TensorBoard cannot be written: {failure}; the training continues")

    @property
    def lost(self) -> int:
        """Return how many figures TensorBoard has not got, as they could not be written."""
        return self._events.lost if self._events else 0

    def say(self, text: str) -> None:
        """Print one line; training continues where it cannot be written, as on a full disk."""
        try:
            self.console.print(text)
        except OSError as failure:
            self.warn("stdout", f"what a run prints cannot be written: {failure}; the run continues")

    def warn(self, what: str, text: str) -> None:
        """Print a warning on stderr, once for each thing that it is about."""
        if what not in self.warned:
            self.warned.add(what)
            with contextlib.suppress(OSError):
                print_warning(text)
