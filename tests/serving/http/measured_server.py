"""`python -m serving serve` on an event loop that writes down how long each of its rounds holds it.

    python -m tests.serving.http.measured_server FILE MODEL OPTIONS...

FILE gets a line for each round of more than a millisecond: its milliseconds of processor time, so that other work on
the machine is not counted.
"""

import asyncio
import sys
import time
from pathlib import Path

from serving.__main__ import main
from serving.http import access

SHOWN_MS = 1.0


class MeasuredLoop(asyncio.SelectorEventLoop):
    """Asyncio's own loop, whose rounds can be measured."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file.open("a", buffering=1)

    def _run_once(self) -> None:
        start_s = time.thread_time()
        super()._run_once()
        held_ms = 1000 * (time.thread_time() - start_s)
        if held_ms > SHOWN_MS:
            self._file.write(f"{held_ms:.1f}\n")


if __name__ == "__main__":
    file = Path(sys.argv.pop(1))
    access._TimedLoop = lambda _: MeasuredLoop(file)
    main()
