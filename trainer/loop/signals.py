"""SIGINT and SIGTERM end a run at a step's end: the ranks agree on the step, write a checkpoint, and exit."""

import signal
from types import FrameType, TracebackType
from typing import Any

from trainer.errors import RemoteRankError, TrainerError


class StoppedError(TrainerError):
    """A signal asked for the run to end. It travels to the other ranks as any error does, instead of a batch."""

    @classmethod
    def sent_by(cls, failure: RemoteRankError) -> "StoppedError | None":
        """What another rank raised, if that was its wish to stop."""
        mark = f"{cls.__name__}: "
        return cls(failure.text.removeprefix(mark)) if failure.text.startswith(mark) else None


class StopSignals:
    """Within the block the first SIGINT or SIGTERM is only noted; the second one acts as if this were not here."""

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
