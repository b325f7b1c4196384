"""Errors of the explorer."""

from typing import ClassVar

from featurestore.errors import USAGE, UserError


class ExplorerError(UserError):
    """What was typed or asked for does not work."""

    exit_code: ClassVar[int] = USAGE


class NotHereError(ExplorerError):
    """A page's address names what is not there: a key, a snapshot, a run. The answer is 404."""
