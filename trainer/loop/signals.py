"""SIGINT and SIGTERM end a run at a step's end: the ranks agree on the step, write a checkpoint, and exit."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from trainer.errors import RemoteRankError, TrainerError


class StoppedError(TrainerError):
    """A signal asked for the run to end. It travels to the other ranks as any error does, instead of a batch."""


@contextlib.contextmanager
def stopped_together() -> Iterator[None]:
    """Raise StoppedError in the block where another rank has raised it."""
    try:
        yield
    except RemoteRankError as failure:
        if failure.kind == StoppedError.__name__:
            raise StoppedError(failure.text) from None
        raise


class StopSignals:
    """Notes the first SIGINT or SIGTERM within the block; the second one acts as without it."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, self._before[number])
