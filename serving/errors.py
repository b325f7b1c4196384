"""Errors of bundles and of requests to the scorer.

UserError
└── ServingError
    ├── BundleNotFoundError    no bundle at the address, or no such version
    ├── BrokenBundleError      a file of a bundle is missing or damaged
    ├── ServerSettingsError    an option of the server does not work: certificate, key, folder
    ├── ListenError            the server cannot listen at the address: port taken, name unknown
    └── RequestError           a request that cannot be scored: field, value and the way out
        ├── RequestTooLargeError   more candidates, values or bytes than the scorer accepts
        └── NotFiniteError         logits that are not finite numbers
"""

from featurestore.errors import UsageError, UserError


class ServingError(UserError):
    """Root of all errors of serving."""


class BundleNotFoundError(ServingError, UsageError):
    """No bundle at the address, or no such version of it."""


class BrokenBundleError(ServingError):
    """A file of a bundle is missing or damaged."""


class RequestError(ServingError):
    """A request that cannot be scored; the message names the field, the value and the way out."""


class RequestTooLargeError(RequestError):
    """A request with more candidates, values or bytes than the scorer accepts."""


class NotFiniteError(RequestError):
    """A request whose logits are not finite numbers."""


class ServerSettingsError(ServingError, UsageError):
    """An option of the server does not work: a certificate, a key, a missing folder."""


class ListenError(ServingError):
    """The server cannot listen at the address: another program has the port, or this machine lacks the address."""
