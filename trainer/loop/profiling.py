"""A trace of a few steps in Chrome's format, in which every stage has its name: for chrome://tracing or Perfetto.

One that cannot be written ends nothing, and leaves no half of it: torch alone prints an error and leaves half a file.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from featurestore.published.paths import RunPath
from featurestore.storage.local import sync

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
