"""Errors of the explorer."""

from typing import ClassVar

from featurestore.errors import USAGE, UserError


class ExplorerError(UserError):
    """An option or a request of the user does not work."""

    exit_code: ClassVar[int] = USAGE


class NotHereError(ExplorerError):
    """A page's address names a missing key, snapshot or run. The answer is 404."""
