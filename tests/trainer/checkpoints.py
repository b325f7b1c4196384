"""The checkpoints of a run on a disk or S3: which there are, what they hold, and damage to them."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from featurestore.published.paths import RunPath
from featurestore.storage.storage import Storage
from tests.raised import told
from trainer.problems import Problem
from trainer.runs.checkpoint import read_state
from trainer.runs.folder import Checkpoint, checkpoints_of, finished


def differs(where: str, value: object, **other: Any) -> re.Pattern[str]:
    """What names a setting with its value here, and by `other` and `there` that of the checkpoint."""
    return re.compile(told(Problem.SETTING_DIFFERS, where=where, value=value, **other))


def names_of(run: RunPath) -> list[str]:
    """The names of a run's checkpoints, oldest first."""
    return [each.name for each in finished(run)]


def steps_of(run: RunPath) -> list[int]:
    """The steps of a run's checkpoints, oldest first."""
    return [each.step for each in finished(run)]


def of_step(run: RunPath, step: int) -> Checkpoint:
    """The checkpoint of a step."""
    (found,) = [each for each in finished(run) if each.step == step]
    return found


def tensors_of(run: RunPath, step: int | None = None) -> dict[str, Tensor]:
    """All tensors of all files of the newest checkpoint, or of that of a step, by name."""
    found = finished(run)[-1] if step is None else of_step(run, step)
    files = [load(found.read_bytes(name)) for name in read_state(found).files]
    return {name: tensor for file in files for name, tensor in file.items()}


def assert_same_tensors(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Check that both have the same names, and the same bits under each."""
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def content_of(found: Checkpoint) -> dict[str, bytes]:
    """The bytes of all files of a checkpoint, by name."""
    return {name: found.read_bytes(name) for name in found.files.list(found.name)}


def files_of(run: RunPath) -> list[str]:
    """The files that lie in a run's folder of checkpoints, each without what is random in its name."""
    entries = Storage(str(checkpoints_of(run))).entries("files")
    return sorted(re.sub("-[0-9a-f]{32}", "", each.path.removeprefix("files/")) for each in entries)


def damage(run: RunPath, step: int, name: str, how: str) -> None:
    """Damage a file of a checkpoint where it lies."""
    found = of_step(run, step)
    storage, path = Storage(str(checkpoints_of(run))), found.files.published.files[f"{found.name}/{name}"].path
    data = storage.read_bytes(path)
    if how == "missing":
        storage.delete_files([path])
    else:
        storage.write_bytes(path, damaged(data, how))


def damaged(data: bytes, how: str) -> bytes:
    """The content of a file, damaged."""
    match how:
        case "cut":
            return data[:-5]
        case "head":
            return b"\xff" * 16 + data[16:]
        case "names":
            return data.replace(b'"item/', b'"itex/')
        case _:
            at = int(how)
            return data[:at] + bytes([data[at] ^ 4]) + data[at:][1:]
