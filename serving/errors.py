"""Errors of bundles and of requests to the scorer.

UserError
└── ServingError
    ├── BundleNotFoundError    no bundle at the address, or no such version
    ├── BrokenBundleError      a file of a bundle is missing, or not what was published
    ├── ServerSettingsError    what the server was started with does not work
    ├── ListenError            nobody can listen at the address: the port is taken, the name unknown
    └── RequestError           a request that cannot be scored: which field, which value, the way out
        ├── RequestTooLargeError   more candidates or bytes than the scorer takes
        └── NotFiniteError         logits that are not finite numbers
            └── OverflowingInputError   because a value is too large for its field's transform

Every class takes its message alone, so that each survives pickling between processes.
"""

from featurestore.errors import USAGE, UserError


class ServingError(UserError):
    """Root of all errors of serving."""


class BundleNotFoundError(ServingError):
    """No bundle at the address, or no such version of it."""

    exit_code = USAGE


class BrokenBundleError(ServingError):
    """A file of a bundle is missing, or is not what was published."""


class RequestError(ServingError):
    """A request that cannot be scored; the message names the field, the value and the way out."""


class RequestTooLargeError(RequestError):
    """A request with more candidates, values or bytes than the scorer takes."""


class NotFiniteError(RequestError):
    """A request for which the network gives logits that are not finite numbers."""


class OverflowingInputError(NotFiniteError):
    """A request with a number that its field's transform makes infinite."""


class ServerSettingsError(ServingError):
    """What the server was started with does not work: a certificate, a key, a folder that is not there."""

    exit_code = USAGE


class ListenError(ServingError):
    """Nobody can listen at the address: another program has the port, or this machine has no such address."""
