"""A script in a child process, which gets the signals of its parent."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Self

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SIGNAL_EXIT = 128  # a shell's exit code for a death by signal is this plus the signal's number


class ScriptRunner:
    """Runs a script, and hands it the signals SIGINT, SIGTERM and SIGHUP that come from `with` on.

    Before the script runs they raise KeyboardInterrupt or SystemExit here, while it runs they go to it, and afterwards
    they are ignored, so that closing is not cut short.

    The script's process has its own group, so that a terminal's ctrl-C reaches it once, by way of us. A second signal
    kills the whole group. Use in the main thread; `run` once.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = False
        self._pending: int | None = None
        self._ending = False  # the first signal was passed on
        self._handlers_before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in FORWARDED:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup asked for that
            self._handlers_before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run `command`, with our output as its output, and return its exit code: 128 + n when signal n ended it.

        Its input is ours too, except a terminal: a background group that reads one is stopped for ever.
        """
        stdin = subprocess.DEVNULL if sys.stdin is not None and sys.stdin.isatty() else None
        sys.stdout.flush()
        sys.stderr.flush()
        self._starting = True  # a signal between fork and assignment must not lose the child
        self._process = subprocess.Popen(list(command), env=dict(environment), stdin=stdin, process_group=0)
        self._starting = False
        if self._pending is not None:
            self._on_signal(self._pending, None)
        code = self._process.wait()
        return SIGNAL_EXIT - code if code < 0 else code

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._starting:
            self._pending = number
        elif not self._ending:
            self._ending = True
            if self._process is None:
                if number == signal.SIGINT:
                    raise KeyboardInterrupt
                raise SystemExit(SIGNAL_EXIT + number)
            self._process.send_signal(number)
        elif self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
