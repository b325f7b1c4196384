"""Errors of the explorer, and what pages do about those of others."""

from collections.abc import Callable
from typing import TypeVar

from featurestore.errors import UsageError, UserError
from featurestore.text import one_line

T = TypeVar("T")


class ExplorerError(UsageError):
    """An option or a request of the user does not work."""


class RequestError(ExplorerError):
    """A parameter of a page's address, or a form, is not what the page takes."""


class NotHereError(ExplorerError):
    """A page's address names a missing key, snapshot or run. The answer is 404."""


def tried(work: Callable[[], T]) -> tuple[T | None, str]:
    """Do what may fail by no bug; return its result and no problem, or no result and the problem in one line."""
    try:
        return work(), ""
    except UserError as error:
        return None, one_line(error)
