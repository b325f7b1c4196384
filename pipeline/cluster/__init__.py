"""Dask: dask-submit, the connection to a cluster, and tasks on it.

Each worker of a cluster of ours loads this file first, so that a heartbeat that meets the scheduler's end is not
logged: it would be a traceback at the end of a job that has succeeded. A scheduler that is lost before is told by the
client.
"""

import logging


def is_told(record: logging.LogRecord) -> bool:
    """Tell whether a record of distributed.worker is for the user."""
    return "scheduler during heartbeat" not in record.getMessage()


logging.getLogger("distributed.worker").addFilter(is_told)
