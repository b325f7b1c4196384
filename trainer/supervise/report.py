"""What the supervisor says: one line on stderr for each thing that happened."""

import contextlib
import queue
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TextIO

from featurestore.text import printable
from trainer.supervise.policy import HostSlots, Past, RankEnd

_LAST_LINES_S = 10.0
_ERROR, _LONG = "error: ", 500


class Printer:
    """Prints in a thread: a terminal that has been stopped must not keep the supervisor from its hosts."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[tuple[TextIO, str] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._print, daemon=True)
        self._thread.start()

    def line(self, stream: TextIO, text: str) -> None:
        """Print a line, soon."""
        self._lines.put((stream, f"{text}\n"))

    def say(self, text: str) -> None:
        """Print a line of the supervisor's own."""
        self.line(sys.stderr, f"supervise: {printable(text)}")

    def close(self) -> None:
        """Wait until all is printed, but not for ever."""
        self._lines.put(None)
        self._thread.join(_LAST_LINES_S)

    def _print(self) -> None:
        while (line := self._lines.get()) is not None:
            stream, text = line
            with contextlib.suppress(OSError):  # nobody reads any more
                stream.write(text)
                stream.flush()


class LastWords:
    """What a rank said last on stderr, in one line: its last error with the lines indented below it, else any line."""

    def __init__(self) -> None:
        self.text = ""
        self._goes_on = False

    def add(self, line: str) -> None:
        """Take in the next line of stderr."""
        is_error = line.startswith(_ERROR)
        if self._goes_on and line.startswith("  ") and len(self.text) < _LONG:
            self.text += f"{' ' if self.text.endswith(':') else '; '}{line.strip()}"
        elif is_error or (line.strip() and not self.text.startswith(_ERROR)):
            self.text = line.strip()
        self._goes_on = is_error or (self._goes_on and line.startswith("  "))


def end_text(end: RankEnd) -> str:
    """Say how a rank ended, e.g. "rank 3 on b died (signal 9)"."""
    who = f"rank {end.rank} on {end.host}"
    if end.code is None:
        return f"{who} is out of reach" + (f" ({end.error})" if end.error else "")
    if end.was_killed:
        return f"{who} did not end by itself and was killed"
    if end.code < 0:
        why = f": {end.error}" if end.gave_up and end.error else ""
        return f"{who} died (signal {-end.code}{_name(-end.code)}{why})"
    return f"{who} ended with exit code {end.code}" + (f" ({end.error})" if end.error else "")


def _name(number: int) -> str:
    return f", {signal.Signals(number).name}" if number in set(signal.Signals) else ""


def past_text(past: Past) -> str:
    """Say why a generation ended: the end of its culprit, and what the first other rank said of it, or any rank."""
    if past.asked and past.first is None:
        return "stopped after a checkpoint, to continue with more hosts"
    ends = [past.culprit or past.ends[0]]
    if past.first and past.first is not past.culprit:
        ends.append(past.first)
    if (ends[0].code or 0) > 0 and not any(each.error for each in ends):  # rank 0 has the word, and may end later
        ends += [each for each in past.ends if each.error and each.error.startswith(_ERROR)][:1]
    return "; ".join(map(end_text, ends))


def start_text(step: int, hosts: Sequence[HostSlots], slots_left: int, slots: int) -> str:
    """Say with what the next generation begins."""
    ranks = sum(each.count for each in hosts)
    where = ", ".join(f"{each.host}:{each.count}" for each in hosts)
    begin = f"resuming at step {step:,}" if step else "starting at the first step"
    return f"{slots_left} of {slots} slots left; {begin} on {ranks} rank{'s' * (ranks != 1)} ({where})"
