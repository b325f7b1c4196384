"""YAML files of a person, read with one line for each mistake."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featurestore.storage.regular import read_text
from featurestore.storage.storage import Storage
from featurestore.text.parsing import parse_yaml
from trainer.errors import TrainerError


def read_mapping(path: Path, setting: str, error: type[TrainerError], wanted: str = "a mapping") -> dict[str, Any]:
    """What a YAML file says, which `setting`, an option with its = or its space, names. Raises `error`."""
    try:
        values = parse_yaml(read_text(path))
    except FileNotFoundError as failure:
        raise error(f"{setting}{path}: there is no such file") from failure
    except (OSError, ValueError) as failure:
        raise error(f"{path} is not a readable YAML file: {failure}") from failure
    if not isinstance(values, Mapping):
        raise error(f"{path} has to be {wanted}, found {type(values).__name__}")
    return dict(values)


def file_at(address: str) -> tuple[Storage, str]:
    """Split the address of a file into its folder and its name there."""
    folder, slash, name = address.rpartition("/")
    return Storage(folder or slash or "."), name
