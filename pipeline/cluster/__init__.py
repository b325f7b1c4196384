"""Dask: dask-submit, the connection to a cluster, and tasks on it.

Each worker of a cluster of ours loads this file first, so that tracebacks are not logged that say nothing: that of a
heartbeat that meets the scheduler's end, after a job that has succeeded (a scheduler that is lost before is told by the
client), and those of errors of ours in tasks, which the job tells in one line.
"""

import logging

OF_A_TASK = "TaskError("
"""Beginning of a task error's text: the name of its class."""


def is_told(record: logging.LogRecord) -> bool:
    """Return whether a record of distributed.worker is for the user."""
    text = record.getMessage()
    return "scheduler during heartbeat" not in text and not (text.startswith("Compute Failed") and OF_A_TASK in text)


logging.getLogger("distributed.worker").addFilter(is_told)
