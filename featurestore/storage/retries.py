"""What an object store's client may raise, and whether it is worth trying again.

The clients' own retries are switched off: one layer decides, with one patience, and says at the end how often it tried.
"""

import errno
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

PATIENCE_S = 60.0  # a restarted server is back by then
_WARN_AFTER_S = 5.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0

_LOST_RACE_CODES = {"PreconditionFailed", "412"}
_CONFLICT_CODES = {"ConditionalRequestConflict", "OperationAborted", "409"}
_THROTTLE_CODES = {"SlowDown", "ServiceUnavailable", "TooManyRequests", "RequestLimitExceeded", "Throttling"}
_THROTTLE_CODES |= {"ThrottlingException", "429", "503"}
_SERVER_CODES = {"InternalError", "RequestTimeout", "IncompleteBody", "BadDigest", "500", "502", "504"}
_SERVER_STATUSES = {500, 502, 503, 504}
_PASSING_ERRNOS = {errno.EBUSY, errno.EIO, errno.EREMOTEIO, errno.EAGAIN, errno.EPIPE, errno.ETIMEDOUT}
# By name, as importing the clients takes longer than most commands run.
_PASSING_CLASSES = {"ConnectionError", "HTTPClientError", "ResponseParserError", "ClientError", "IncompleteRead"}
_CLIENT_PACKAGES = ("botocore", "aiohttp", "urllib3")

_log = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")


def persist(work: Callable[[], ResultT], worth_it: Callable[[BaseException], bool] | None = None) -> ResultT:
    """The result of `work`, tried again with growing waits for up to `PATIENCE_S` while its error is `worth_it`.

    Passing errors by default. Raises tenacity's RetryError when the patience is at its end, other errors at once.
    """
    attempts = Retrying(
        retry=retry_if_exception(worth_it or is_passing),
        stop=stop_after_delay(PATIENCE_S),
        wait=wait_random_exponential(multiplier=_FIRST_WAIT_S, max=_LONGEST_WAIT_S),
        before_sleep=_warn,
    )
    return attempts(work)


def is_passing(error: BaseException | None) -> bool:
    """Whether the same request may succeed later: throttled, failed in the server, cut off, or timed out."""
    if error is None:
        return False
    code = answer_code(error)
    if code is not None:
        return code in _THROTTLE_CODES | _SERVER_CODES | _CONFLICT_CODES or _status(error) in _SERVER_STATUSES
    # Before the errno: some of the clients' classes are OSErrors too, without one.
    families = (kind for kind in type(error).__mro__ if kind.__module__.startswith(_CLIENT_PACKAGES))
    if any(kind.__name__ in _PASSING_CLASSES for kind in families):
        return True
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno in _PASSING_ERRNOS


def was_not_done(error: BaseException) -> bool:
    """Whether the server says that it did not do what was asked and that asking again may help.

    Unlike a cut connection, after which nobody knows.
    """
    return answer_code(error) in _THROTTLE_CODES | _CONFLICT_CODES


def says_exists(error: BaseException) -> bool:
    """Whether an exclusive create was refused because something is there; servers and clients say it in three ways."""
    return isinstance(error, FileExistsError) or answer_code(error) in _LOST_RACE_CODES


def answer_code(error: BaseException) -> str | None:
    """S3's name of the error, or the HTTP status as text; None where no answer came."""
    code = _response(error).get("Error", {}).get("Code")
    return None if code is None else str(code)


def _warn(state: RetryCallState) -> None:
    """Say what is being waited for, once it takes long enough for a person to wonder."""
    error = state.outcome.exception() if state.outcome is not None else None
    if error is not None and (state.seconds_since_start or 0) > _WARN_AFTER_S:
        _log.warning("storage: %s; trying again for up to %.0f s", str(error) or type(error).__name__, PATIENCE_S)


def _status(error: BaseException) -> int:
    return int(_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _response(error: BaseException) -> dict[str, dict[str, Any]]:
    """botocore's record of the answer: s3fs raises Python's own errors, with botocore's as their cause."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return response
    return {}
