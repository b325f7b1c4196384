"""Stores that a person accepted in the place of the one a run was trained on: computed anew after a loss, say.

They stand in the run's folder, so every command that opens one of its checkpoints finds them; `python -m trainer.compat
RUN STORE --accept` writes them.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from featurestore.errors import StorageError
from featurestore.parsing import first_mistake
from featurestore.published.paths import RunPath, read_file, write_file
from featurestore.snapshot import SnapshotId
from trainer.config.options import Section
from trainer.errors import CheckpointError
from trainer.runs.folder import Checkpoint

FILE = "accepted-stores.json"


class AcceptedStore(Section):
    """A store that replaces the one called `name` in the schema: `accepted` is read where a checkpoint has `recorded`.

    `figures`: what was known of the two when that was decided.
    """

    name: str
    recorded: SnapshotId
    accepted: SnapshotId
    figures: dict[str, Any]

    def replaces(self, name: str, record: SnapshotId) -> bool:
        """Tell whether `record` is of the store that was replaced.

        Of one store put back from a backup, it has to be the very snapshot."""
        if (name, record.store_id) != (self.name, self.recorded.store_id):
            return False
        return self.accepted.store_id != record.store_id or record.commit_id == self.recorded.commit_id


class _AcceptedStores(Section):
    accepted: list[AcceptedStore]


def standing_in(checkpoint: Checkpoint, stores: Mapping[str, SnapshotId]) -> dict[str, SnapshotId]:
    """Find what is to be read of each store: what was accepted in the place of what the checkpoint recorded, or that.

    Raises CheckpointError where the file of accepted stores is damaged."""
    found = dict(stores)
    for each in _read(_file_of(checkpoint)):
        for name, record in found.items():
            if each.replaces(name, record):
                found[name] = each.accepted
    return found


def accept(checkpoint: Checkpoint, store: AcceptedStore) -> RunPath:
    """Accept a store for the checkpoint's run, in place of an earlier one for the same; returns the file.

    Raises CheckpointError where it cannot be written.
    """
    return _write(checkpoint, [*_others(checkpoint, store.name, store.recorded), store])


def withdraw(checkpoint: Checkpoint, name: str, recorded: SnapshotId) -> RunPath | None:
    """Take back what was accepted in the place of `recorded`, which is there again.

    Returns the file; None where nothing was accepted. Raises CheckpointError where it cannot be written.
    """
    left = _others(checkpoint, name, recorded)
    return _write(checkpoint, left) if len(left) < len(_read(_file_of(checkpoint))) else None


def _others(checkpoint: Checkpoint, name: str, recorded: SnapshotId) -> list[AcceptedStore]:
    return [each for each in _read(_file_of(checkpoint)) if not each.replaces(name, recorded)]


def _write(checkpoint: Checkpoint, stores: list[AcceptedStore]) -> RunPath:
    file = _file_of(checkpoint)
    try:
        write_file(file, _AcceptedStores(accepted=stores).model_dump_json(indent=1) + "\n")
    except (OSError, StorageError) as failure:
        raise CheckpointError(f"{file} cannot be written: {failure}") from failure
    return file


def _file_of(checkpoint: Checkpoint) -> RunPath:
    return checkpoint.run / FILE


def _read(file: RunPath) -> list[AcceptedStore]:
    try:
        return _AcceptedStores.model_validate_json(read_file(file)).accepted
    except FileNotFoundError:
        return []
    except (OSError, StorageError, ValidationError) as failure:
        first = first_mistake(failure) if isinstance(failure, ValidationError) else failure
        raise CheckpointError(
            f"{file} is damaged: {first}; remove it, and accept the store again: python -m trainer.compat RUN STORE"
        ) from failure
