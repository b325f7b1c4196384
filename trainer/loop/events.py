"""TensorBoard's file of a run, whose loss ends nothing: what cannot be written is counted, and the next is tried.

Not by torch's SummaryWriter: its thread dies of a full disk, and every call after that raises. It leaves half of a
record too, behind which TensorBoard reads nothing.
"""

import io
import itertools
import os
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

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
