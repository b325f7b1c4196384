"""Progress of a training: lines, events and profiles.

Events are not written by torch's SummaryWriter: its thread dies of a full disk, and every call after that raises. It
leaves half of a record too, behind which TensorBoard reads nothing.

A profile that cannot be written ends nothing, and leaves no half of it: torch alone prints an error and leaves half a
file.
"""

import contextlib
import io
import itertools
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils.tensorboard.summary import scalar

from featurestore.console.output import figure, print_warning, progress_bars, text_column, text_console
from featurestore.published.paths import RunPath
from featurestore.storage.local import sync

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


_numbers = itertools.count()


class EventsFile:
    """One file of scalars in a folder, which is made with the first of them; by name it comes after earlier ones.

    TensorBoard hides what earlier files have of `first_step` and later ones. `lost`: figures that are not in it.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        now_s = time.time()
        of_process = f"{os.getpid()}.{next(_numbers):06}"  # a process may begin two within a second
        self._path = folder / f"events.out.tfevents.{now_s:010.0f}.{socket.gethostname()}.{of_process}"
        start = SessionLog(status=SessionLog.START)
        self._head = [
            Event(wall_time=now_s, file_version="brain.Event:2"),
            Event(wall_time=now_s, step=first_step, session_log=start),
        ]
        self._size_bytes = 0  # of whole records
        self.lost = 0

    def add(self, step: int, values: Mapping[str, float]) -> OSError | None:
        """Append the values of a step, all or none; return why they could not be written."""
        now_s = time.time()
        events = [
            Event(wall_time=now_s, step=step, summary=scalar(name, value))  # type: ignore[no-untyped-call]
            for name, value in values.items()
        ]
        data = _records(events if self._size_bytes else [*self._head, *events])
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.truncate(self._size_bytes)
                file.write(data)
        except OSError as failure:
            self.lost += len(events)
            return failure
        self._size_bytes += len(data)
        return None


def _records(events: Iterable[Event]) -> bytes:
    buffer = io.BytesIO()
    records = RecordWriter(buffer)
    for event in events:
        records.write(event.SerializeToString())
    return buffer.getvalue()


SKIPPED_STEPS, TRACED_STEPS = 5, 5
"""The first steps pay for buffers and caches; one more warms the profiler itself up."""


PLACE = "profile"
"""The folder of a run that has the traces."""


def traces_text(local: Path, run: RunPath) -> str:
    """Say where the traces of a run are, which were written to `local`, or why there are none."""
    if any((local / PLACE).glob("trace-*.json")):
        return f"traces, for chrome://tracing or Perfetto: {run / PLACE}"
    return f"no trace was written: it begins after {SKIPPED_STEPS + 1} steps, and this run had no more"


@contextmanager
def tracing(folder: Path | None, rank: int, warn: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Trace some steps into `folder`/trace-rank-N.json: call what it yields after each; without a folder, do nothing.

    A run of fewer steps than are skipped and traced has a trace of those that it had, or none. `warn` is called
    where it cannot be written.
    """
    if folder is None:
        yield _nothing
        return
    path = folder / f"trace-rank-{rank}.json"

    def write(done: profile) -> None:
        try:
            _write_whole(done, path)
        except (OSError, RuntimeError) as failure:
            warn(f"the trace {path} cannot be written: {failure}; the training continues")

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(
        activities=activities,
        schedule=schedule(wait=SKIPPED_STEPS, warmup=1, active=TRACED_STEPS, repeat=1),
        on_trace_ready=write,
        # The next step is prepared in a thread of its own.
        experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=True),
    ) as profiler:
        yield profiler.step


def _write_whole(done: profile, path: Path) -> None:
    """Write a trace, all or nothing. Raises OSError, RuntimeError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".trace-", dir=path.parent) as folder:
        part = Path(folder) / path.name
        done.export_chrome_trace(str(part))
        if not part.exists():
            raise OSError("is the disk full?")  # torch has printed an error, and does not say which
        sync(part)
        part.replace(path)


def _nothing() -> None:
    """Do nothing, after a step that is not traced."""
