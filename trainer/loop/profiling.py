"""A trace of a few steps in Chrome's format, in which every stage has its name: for chrome://tracing or Perfetto."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from featurestore.published.paths import RunPath

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
def tracing(folder: Path | None, rank: int) -> Iterator[Callable[[], None]]:
    """Trace some steps into `folder`/trace-rank-N.json: call what it yields after each; without a folder, do nothing.

    A run of fewer steps than are skipped and traced has a trace of those that it had, or none.
    """
    if folder is None:
        yield _nothing
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = str(folder / f"trace-rank-{rank}.json")
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(
        activities=activities,
        schedule=schedule(wait=SKIPPED_STEPS, warmup=1, active=TRACED_STEPS, repeat=1),
        on_trace_ready=lambda done: done.export_chrome_trace(path),
        # The next step is prepared in a thread of its own.
        experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=True),
    ) as profiler:
        yield profiler.step


def _nothing() -> None:
    """Do nothing, after a step that is not traced."""
