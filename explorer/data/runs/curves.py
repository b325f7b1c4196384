"""Curves of a run: its TensorBoard files, read incrementally.

An incomplete record is read again later.
"""

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from explorer.data.cache import LruCache
from explorer.data.runs.folders import TENSORBOARD
from featurestore.published.paths import RemotePath, RunPath

MOST_POINTS = 300
"""Most points of a drawn curve; of more, every second, third, … and the last."""
_KEPT_POINTS = 2000
"""Most points of a curve in memory; of more, a sample and the last."""
_KEPT_RUNS = 24
_LOSS, _STAGE, _AHEAD = "train/loss", "stage_ms/", "stage_hidden/"
_EVALUATED = ("test/", "validation/")
"""Evaluations are of the test samples; of validation days where there are some, with the test samples at the end."""


@dataclass(frozen=True)
class ScalarCurve:
    """Values over steps, both (N,)."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def last(self) -> float | None:
        """The newest value of the curve."""
        return self.values[-1] if self.values else None


class StageTime(NamedTuple):
    """A stage of a step: its milliseconds, and whether it runs ahead, during the previous step."""

    name: str
    ms: float
    is_ahead: bool


@dataclass(frozen=True)
class Curves:
    """All curves of a run, by TensorBoard's tag, and the stages of its last logged step."""

    by_tag: Mapping[str, ScalarCurve]
    stages: tuple[StageTime, ...]

    @property
    def loss(self) -> ScalarCurve:
        """The loss of training batches."""
        return self.by_tag.get(_LOSS, _EMPTY)

    def test(self, metric: str) -> ScalarCurve:
        """Return the curve of a metric of the samples that the run was evaluated on most often."""
        found = [self.by_tag.get(split + metric, _EMPTY) for split in _EVALUATED]
        return max(found, key=lambda curve: len(curve.steps))

    @property
    def last_step(self) -> int | None:
        """The last logged step."""
        return self.loss.steps[-1] if self.loss.steps else None


_EMPTY = ScalarCurve((), ())


class CurveReader:
    """Reads the curves of runs, continuing where it stopped for those requested last."""

    def __init__(self) -> None:
        self._readers: LruCache[_OneRun] = LruCache(_KEPT_RUNS, close=_OneRun.close)

    def read(self, folder: RunPath) -> Curves:
        """Read new records, and return all curves; a run without such files has none. Raises OSError, StorageError.

        Cost: about a second for 100,000 figures at the first time.
        """
        return self._readers.get(str(folder), lambda: _OneRun(folder)).read()

    def close(self) -> None:
        """Remove copies of files from addresses."""
        self._readers.clear()


class _OneRun:
    """The files of one run, or copies of them; reset if the run was started again."""

    def __init__(self, folder: RunPath) -> None:
        self._folder = folder / TENSORBOARD
        self._lock = Lock()
        self._names: list[str] = []
        self._events: Any = None
        self._copies: tempfile.TemporaryDirectory[str] | None = None

    def read(self) -> Curves:
        with self._lock:
            place = self._copied() if isinstance(self._folder, RemotePath) else self._folder
            names = sorted(each.name for each in place.iterdir()) if place.is_dir() else []
            if not names:
                return Curves({}, ())
            if self._events is None or names[: len(self._names)] != self._names:
                self._events = _accumulator(place)
            self._names = names
            self._events.Reload()
            tags = self._events.Tags()["scalars"]
            return _curves({tag: _curve(self._events.Scalars(tag)) for tag in tags})

    def _copied(self) -> Path:
        """Copy the files of an address, which are replaced as wholes; they are few and small."""
        assert isinstance(self._folder, RemotePath)
        self.close()
        self._events, self._copies = None, tempfile.TemporaryDirectory(prefix="explorer-curves-")
        place = Path(self._copies.name)
        for file in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                (place / Path(file.name).name).write_bytes(file.read_bytes())
        return place

    def close(self) -> None:
        if self._copies is not None:
            self._copies.cleanup()


def _accumulator(place: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    return EventAccumulator(str(place), size_guidance={SCALARS: _KEPT_POINTS})


def _curve(events: Any) -> ScalarCurve:
    every = -(-len(events) // MOST_POINTS)
    chosen = events[::every] if every > 1 else events
    if chosen and chosen[-1] is not events[-1]:
        chosen = [*chosen, events[-1]]
    return ScalarCurve(tuple(each.step for each in chosen), tuple(each.value for each in chosen))


def _curves(by_tag: Mapping[str, ScalarCurve]) -> Curves:
    stages = tuple(
        StageTime(name, curve.values[-1], f"{_AHEAD}{name}" in by_tag)
        for tag, curve in by_tag.items()
        if tag.startswith(_STAGE) and curve.values
        for name in (tag.removeprefix(_STAGE),)
    )
    return Curves(by_tag, stages)


def stages_of_report(report: Mapping[str, Any]) -> tuple[StageTime, ...]:
    """Read the stages of a finished run: medians over its steps, in their order."""
    stages = report.get("stages")
    if not isinstance(stages, dict):
        return ()
    return tuple(
        StageTime(str(name), float(row["median_ms"]), row.get("hidden") is not None)
        for name, row in stages.items()
        if isinstance(row, dict) and isinstance(row.get("median_ms"), int | float)
    )
