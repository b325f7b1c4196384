"""Errors that end a command with one line, and those of a feature store.

UserError                     root of all errors of ours, also of pipeline.errors and trainer.errors
└── UsageError              an argument or setting is wrong: the second base of those that end a command with 2
    └── OutputPlaceError    a file that was asked for cannot be written where it was asked for
FeatureStoreError
├── StoreNotFoundError      no store at the address
├── StoreExistsError        a store is there already
├── SnapshotNotFoundError   the version was never committed, or has expired
├── PinError                the name of a pin is taken, unknown, or not valid
├── ChannelError            the name of a channel is unknown, or not valid
├── FormatVersionError      written by a newer format than this code reads
├── SpecMismatchError       features of another network, dtype or width
├── AnotherStoreError       a store of the same kind, but not the expected one
├── InvalidRowsError        rows that no store may hold (NaN, wrong shape)
│   ├── DimsError           a width that a compact store of these rows cannot have
│   ├── KeyCollisionError   two uris under one key
│   └── KeyFileError        a file of keys or uris that has something else
├── ImageNameError          an image that is named by neither a uri nor a key
├── MissingKeysError        keys without a feature
├── CommitConflictError     another writer was in the way: read again and retry
├── CorruptFileError        a file is damaged, truncated or replaced
├── QueryError              a request that a feature server does not understand
├── PasswordError           a password in an address, which logs would show
├── AddressError            an address without a bucket, or of a scheme that nothing here opens
├── TokenFileError          a file of tokens is not there, or has none that is long enough
├── ServerError             a feature server does not answer as it should
│   ├── UnavailableError    nobody listens there, or the connection broke: try again
│   ├── DeadlineError       no answer in time
│   └── AccessError         a token or a certificate is refused
└── StorageError            the disk or the object store refused
    ├── NotAFolderError     a file is there where a folder is needed
    ├── BucketNotFoundError the object store has no such bucket
    └── UnsafeBackendError  the place cannot hold a store: its exclusive create is not atomic

Each error is raised with its problem, a member of the `Problem` of the package that raises it, and with the values of
that sentence: a caller compares these, not words. Both survive pickling between processes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from string import Formatter
from typing import ClassVar

FAILED, USAGE = 1, 2


class Sentences(StrEnum):
    """The problems of a package, each with the sentence that tells it and its values by name, as str.format has them.

    `{where}` is the place of a problem (a file, a row, a setting), `{value}` what stands there, and others have names
    of their own.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the values that the sentence tells, in their order, each once."""
        return tuple(dict.fromkeys(name for _, name, _, _ in Formatter().parse(self) if name))

    def of(self, *values: object) -> str:
        """Write the sentence with these values; ValueError where their number is not that of its names."""
        return self.format(**dict(zip(self.names, values, strict=True)))


class UserError(Exception):
    """An error whose text is one message for the user who started a command, which ends with `exit_code`.

    `problem` is a sentence of `Sentences` and `values` are what it tells; or the words of another error, which are told
    as they are. A value that is an exception is kept as its words.
    """

    exit_code: ClassVar[int] = FAILED

    def __init__(self, problem: str = "", *values: object) -> None:
        super().__init__(problem, *(str(each) if isinstance(each, BaseException) else each for each in values))

    @property
    def problem(self) -> str:
        """What is wrong: a member of a `Problem`, or words of another error."""
        problem: str = self.args[0]
        return problem

    @property
    def values(self) -> dict[str, object]:
        """What the sentence tells, by name: `where` is the place, `value` what stands there."""
        return dict(zip(self.problem.names, self.args[1:], strict=True)) if isinstance(self.problem, Sentences) else {}

    def __str__(self) -> str:
        return self.problem.of(*self.args[1:]) if isinstance(self.problem, Sentences) else str(self.problem)


class UsageError(UserError):
    """An argument or setting is wrong, or names a missing thing: the command ends with 2."""

    exit_code = USAGE


@contextmanager
def naming(place: str, name: str) -> Iterator[None]:
    """Let the errors of the block name `name` in the place of a file or folder that its user does not know."""
    try:
        yield
    except UserError as failure:
        problem, *values = failure.args
        told = (str(each).replace(place, name) if place in str(each) else each for each in values)
        failure.args = (problem if isinstance(problem, Sentences) else str(problem).replace(place, name), *told)
        raise


class OutputPlaceError(UsageError):
    """A file that was asked for cannot be written where it was asked for."""


class FeatureStoreError(UserError):
    """Root of all errors of the feature store."""


class StoreNotFoundError(FeatureStoreError, UsageError):
    """No store at the address."""


class StoreExistsError(FeatureStoreError, UsageError):
    """A store is at the address already."""


class SnapshotNotFoundError(FeatureStoreError, UsageError):
    """The version was never committed, or its manifest has been removed."""


class PinError(FeatureStoreError, UsageError):
    """The name of a pin is taken, unknown, or not valid."""


class ChannelError(FeatureStoreError, UsageError):
    """The name of a channel is unknown, or not valid."""


class FormatVersionError(FeatureStoreError):
    """The files were written by a newer format than this code reads."""


class SpecMismatchError(FeatureStoreError):
    """Features of another network, dtype or width than those of the store."""


class AnotherStoreError(FeatureStoreError):
    """A store of the same kind, but not the one from which a checkpoint, an index or codes were computed."""


class InvalidRowsError(FeatureStoreError):
    """Rows that no store may hold: not finite, wrong shape or dtype."""


class DimsError(InvalidRowsError, UsageError):
    """A compact store of these rows cannot have this width."""


class KeyCollisionError(InvalidRowsError):
    """Two different uris under one key."""


class KeyFileError(InvalidRowsError, UsageError):
    """A file of keys or uris that cannot be read, is empty, or has something else."""


class ImageNameError(FeatureStoreError):
    """An image is named by neither a uri nor a key."""


class MissingKeysError(FeatureStoreError):
    """Keys without a feature where one is needed."""


class CommitConflictError(FeatureStoreError):
    """Another writer was in the way: read the newest snapshot and retry."""


class CorruptFileError(FeatureStoreError):
    """A file is damaged, truncated or replaced."""


class QueryError(FeatureStoreError, UsageError):
    """A request that a feature server does not understand."""


class PasswordError(FeatureStoreError, UsageError):
    """A password in an address, which configurations, reports and logs would show."""


class AddressError(FeatureStoreError, UsageError):
    """An address without a bucket, or of a scheme that nothing here opens."""


class TokenFileError(FeatureStoreError, UsageError):
    """A file of tokens is missing, has no token, or one that can be guessed."""


class ServerError(FeatureStoreError):
    """A feature server does not answer as it should."""


class UnavailableError(ServerError):
    """Nobody listens at the address, or the connection broke: try again."""


class DeadlineError(ServerError):
    """No answer of a feature server in time."""


class AccessError(ServerError):
    """A feature server refuses the token, or its certificate is not trusted."""


class StorageError(FeatureStoreError):
    """The disk or the object store refused; the cause is kept."""


class NotAFolderError(StorageError, UsageError):
    """A file is there where a folder is needed."""


class BucketNotFoundError(StorageError, UsageError):
    """The object store has no such bucket."""


class UnsafeBackendError(StorageError):
    """The place cannot hold a store: files can be created there by two writers at once, or are not seen at once."""
