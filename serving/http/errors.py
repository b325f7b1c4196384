"""Answers for errors: each is a JSON object {"error": "one message with field, value and the way out"}."""

import logging
import traceback
from collections.abc import Mapping

import orjson
from starlette.responses import Response

from serving.errors import NotFiniteError, RequestError, RequestTooLargeError
from serving.http.limits import RefusedError
from serving.http.live.switch import NotReadyError

logger = logging.getLogger("serving")


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Make the answer of an error."""
    body = orjson.dumps({"error": message, "status": status})
    return Response(body, status, headers=dict(headers or {}), media_type="application/json")


def response_of(error: Exception) -> Response:
    """Turn an error into its answer: 400, 413 or 422 for a request, a RefusedError's status, 503 without a model.

    Any other error is a bug: 500. The log gets the traceback without the message, which may contain user data."""
    if isinstance(error, RefusedError):
        return error_response(error.status, error.message, error.headers)
    if isinstance(error, RequestTooLargeError):
        return error_response(413, str(error))
    if isinstance(error, NotFiniteError):
        return error_response(422, str(error))
    if isinstance(error, RequestError):
        return error_response(400, str(error))
    if isinstance(error, NotReadyError):
        return error_response(503, "the model is being loaded: try again", {"Retry-After": "1"})
    logger.error("bug: %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)).rstrip())
    return error_response(500, f"an error in the server ({type(error).__name__}): its log says where")
