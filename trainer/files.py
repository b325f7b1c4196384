"""YAML files of users, read with one line for each mistake, and the folder of a run's checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from featurestore.errors import StorageError
from featurestore.parsing import parse_yaml
from featurestore.published.paths import FarPath, RunPath, read_text, run_path
from featurestore.storage.storage import Storage, file_at
from trainer.errors import TrainerError

DAYS_FILE = "daily.json"
"""File of the settings that the runs of a daily training share; their folders are next to it."""

PathT = TypeVar("PathT", Path, FarPath, Path | FarPath)


def read_mapping(
    path: RunPath | str,
    setting: str,
    error: type[TrainerError],
    wanted: str = "a mapping",
    *,
    aliases: bool = True,
) -> dict[str, Any]:
    """Read a YAML file; `setting` is the option with its = or space, for messages. Raises `error`.

    The file may be at an address, as s3://shop/samples/schema.yaml. `aliases`: see `parse_yaml`.
    """
    try:
        values = parse_yaml(read_text(run_path(path)), aliases)
    except FileNotFoundError as failure:
        raise error(f"{setting}{path}: there is no such file") from failure
    except IsADirectoryError as failure:
        raise error(f"{setting}{path} is a folder; name a YAML file, as the settings.yaml of samples") from failure
    except (OSError, ValueError, StorageError) as failure:
        raise error(f"{path} is not a readable YAML file: {failure}") from failure
    if not isinstance(values, Mapping):
        raise error(f"{path} has to be {wanted}, found {type(values).__name__}")
    return dict(values)


def output_at(address: str) -> tuple[Storage, str]:
    """Split the address of a file as `file_at`, and check before the work that its object store is there.

    Raises AddressError, BucketNotFoundError, StorageError."""
    storage, name = file_at(address)
    storage.check_bucket()
    return storage, name


def checkpoints_of(run: PathT) -> PathT:
    """Return the folder of the checkpoints of the run in folder `run`."""
    return run / "checkpoints"
