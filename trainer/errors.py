"""The tree of the trainer's errors.

TrainerError
├── ConfigError       a setting is unknown, out of range, or does not fit another
├── SchemaError       the schema of the samples contradicts itself or the model
├── DataError         a sample file or a value in it cannot be used
│   ├── DataNotFoundError        no such samples, table or index of ads, or nothing in it
│   └── OverflowingValueError    a number that its field's transform makes infinite
├── CheckpointError   a checkpoint is damaged, or of another run
│   ├── CheckpointNotFoundError  no such checkpoint
│   ├── DamagedCheckpointError   its files are not those that were written
│   ├── RunMismatchError         a checkpoint of another run, or of other settings
│   └── TakenOverError           another start of the run writes its checkpoints now
├── AdIndexError      an index of ads is of another checkpoint, or its place has other files
├── RemoteRankError   another rank failed; kind and reason are those of its error
└── LostRankError     another rank is gone, or out of reach
    └── LateRankError another rank has not come to a collective in time
"""

from featurestore.errors import UsageError, UserError


class TrainerError(UserError):
    """Root of all errors of the trainer."""


class ConfigError(TrainerError, UsageError):
    """A setting is unknown, out of range, or does not fit another."""


class SchemaError(TrainerError, UsageError):
    """The schema of the samples contradicts itself or the model."""


class DataError(TrainerError):
    """A sample file or a value in it cannot be used."""


class DataNotFoundError(DataError, UsageError):
    """The samples, the table or the index of ads do not exist."""


class OverflowingValueError(DataError):
    """A value of a dense field's `column`, in row `row` of the field, is infinite once its transform is applied."""

    column: str
    row: int


class CheckpointError(TrainerError):
    """A checkpoint is damaged, or belongs to another run."""


class CheckpointNotFoundError(CheckpointError, UsageError):
    """The checkpoint does not exist."""


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is missing or damaged, as its text says."""


class RunMismatchError(CheckpointError, UsageError):
    """The checkpoint belongs to another run: its settings, samples or features differ."""


class TakenOverError(CheckpointError, UsageError):
    """Another start of the run has begun since, and continues it: this one must not be started again."""


class AdIndexError(TrainerError):
    """An index of ads has vectors of another checkpoint, or its folder has other files."""


class RemoteRankError(TrainerError):
    """Another rank failed, so this one stops too; of its values, `kind` is the class of that rank's error."""


class LostRankError(TrainerError):
    """Another rank died or is out of reach in the middle of a collective."""


class LateRankError(LostRankError):
    """Another rank has not come to a collective before its deadline; it may hang."""
