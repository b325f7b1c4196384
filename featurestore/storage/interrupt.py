"""Ctrl-C of a terminal goes to every process of a group: those that a command starts leave it to the command."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def interrupt_blocked() -> Iterator[None]:
    """Let the threads and processes that start in here never see SIGINT, so that the command ends in its own way.

    The mask is inherited by what they start themselves, also later.
    """
    resource_tracker.ensure_running()  # multiprocessing would start it with the first process, and unblock SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
