"""The server's log on stderr: a line for each event of its life and each slow request, without user data.

With --log-requests every body is logged as well.
"""

import logging
import logging.config
import time

from serving.http.live.model import Scores

STAGES = ("read", "wait", "parse", "score", "encode")
logger = logging.getLogger("serving")


def configure_logging(*others: str) -> None:
    """Send the logs of the server and of `others`, and uvicorn's warnings, to stderr, with the time in UTC."""
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"line": {"()": "serving.http.logs.UtcFormatter"}},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
            "loggers": {
                **{
                    name: {"handlers": ["stderr"], "level": "INFO", "propagate": False} for name in ("serving", *others)
                },
                "uvicorn": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
            },
        }
    )


class UtcFormatter(logging.Formatter):
    """Formats a record as time, process, level and message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(process)d %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")

    @staticmethod
    def converter(seconds: float | None) -> time.struct_time:
        """Give the time in UTC."""
        return time.gmtime(seconds)


def log_slow(route: str, status: int, seconds: float, scores: Scores | None, sizes: tuple[int, int]) -> None:
    """Log a slow request: its stages in milliseconds and its sizes, not its contents."""
    parts = ""
    if scores is not None:
        stages = ", ".join(f"{stage} {1000 * scores.stages[stage]:.1f}" for stage in STAGES if stage in scores.stages)
        counts = f"{len(scores.scored)} requests, {scores.num_candidates} candidates"
        parts = f" ({stages}); {counts}, {sizes[0]} bytes received, {sizes[1]} bytes sent"
    logger.warning("slow: %s %d in %.1f ms%s", route, status, 1000 * seconds, parts)
