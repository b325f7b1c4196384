"""A run's folder: its files and its checkpoints."""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from featurestore.errors import BucketNotFoundError, StorageError
from featurestore.parsing import parse_json
from featurestore.published.paths import FarPath, RunPath, check_bucket, read_file, run_path
from featurestore.storage.local import sync
from trainer.config.config import Config, RunConfig
from trainer.errors import CheckpointNotFoundError, ConfigError, TrainerError
from trainer.files import PathT, checkpoints_of

_NAME = re.compile(r"step-\d{8,}")


def run_or_newest(run: str | None) -> RunPath:
    """Return the path of a run that an option names, or the newest run. Raises ConfigError where there is none."""
    return newest_run() if run is None else run_path(run)


def newest_run(folder: Path = Path(RunConfig().dir)) -> Path:
    """Find the run in `folder`, or in a folder of it (those of trainer.daily), that wrote the last checkpoint.

    Raises ConfigError where there is none.
    """
    found = [path / "state.json" for each in folder.glob(f"**/{checkpoints_of(Path())}") for path in finished(each)]
    states = [state for state in found if state.is_file()]
    if not states:
        raise ConfigError(
            f"{folder} has no run with a checkpoint; train one: python -m trainer.main, or name it by --run"
        )
    return max(states, key=lambda state: state.stat().st_mtime_ns).parents[2]


def find_checkpoint(run: RunPath, name: str | None = None, setting: str = "--checkpoint ") -> RunPath:
    """Find a checkpoint of the run in folder `run`: the newest, or the one that `name` says.

    `name`: latest, a step, a folder step-N, or a path to the checkpoint of any run. Raises CheckpointNotFoundError; it
    names the `setting`, an option with its = or its space, that gave the name.
    """
    checkpoints = pinned(checkpoints_of(run))
    found = finished(checkpoints)
    if not found:
        check_bucket(run)
    if name in (None, "latest"):
        if not found:
            asked = f"{setting}{name}: " if name else ""
            raise CheckpointNotFoundError(
                f"{asked}{run} has no checkpoint in {checkpoints}; train it first, without run.resume: "
                f"python -m trainer.main --config {run / 'config.yaml'}"
            )
        return found[-1]
    inside = place(checkpoints, int(name)) if name.isdecimal() else checkpoints / name
    for path in (inside, pinned(run_path(name))):
        if (path / "state.json").is_file():
            return path
        check_bucket(path)
    raise CheckpointNotFoundError(
        f"{setting}{name}: no such checkpoint; {checkpoints} has {', '.join(path.name for path in found) or 'none'}, "
        "and a path to a folder step-N will do too"
    )


def report_of(run: RunPath) -> dict[str, Any] | None:
    """Read the run's report.json; None before its end. Raises TrainerError where it cannot be read."""
    file = run / "report.json"
    try:
        report: dict[str, Any] = parse_json(read_file(file))
    except FileNotFoundError:
        return None
    except (OSError, StorageError, ValueError) as failure:
        raise TrainerError(f"{file} cannot be read: {failure}; remove it, and the run is ended again") from failure
    return report


def place(checkpoints: PathT, step: int) -> PathT:
    """Give the path of the checkpoint of a step."""
    return checkpoints / f"step-{step:08}"


def step_of(checkpoint: RunPath) -> int:
    """Read the step from the path of a whole checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def pinned(path: RunPath) -> RunPath:
    """Return the path, of an object store with the version of its checkpoints that is the newest now.

    They can be read for a while after they were removed.
    """
    return path.pinned() if isinstance(path, FarPath) else path


def finished(checkpoints: PathT) -> list[PathT]:
    """List whole checkpoints, oldest first."""
    listed: Iterable[PathT] = _listed(checkpoints)
    return sorted((path for path in listed if _NAME.fullmatch(path.name)), key=step_of)


def _listed(checkpoints: RunPath) -> Iterable[Any]:
    """The checkpoints, each with the version that it was found in where they are on an object store."""
    return checkpoints.pinned().iterdir() if isinstance(checkpoints, FarPath) else checkpoints.glob("step-*")


def unrelated(checkpoints: RunPath, resumed: RunPath) -> list[RunPath]:
    """List the checkpoints that a run did not pass on its way to `resumed`, oldest first.

    Those are the checkpoints of later steps, or all where `resumed` is not one of them.
    """
    found: list[RunPath] = [*finished(checkpoints)]
    way = next((number for number, path in enumerate(found, 1) if same_place(path, resumed)), 0)
    return found[way:]


def same_place(path: RunPath, other: RunPath) -> bool:
    """Tell whether two paths lead to the same folder or address; both are there."""
    if isinstance(path, FarPath) or isinstance(other, FarPath):
        return str(path) == str(other)
    return path.samefile(other)


def remove(checkpoints: Sequence[Path]) -> None:
    """Remove checkpoints of one folder, given oldest first.

    A kill in between leaves the older ones whole and nothing after them: the newest one goes first, its name at once.
    """
    for path in reversed(checkpoints):
        hidden = path.with_name(f".{path.name}")
        path.rename(hidden)
        sync(path.parent)
        shutil.rmtree(hidden)


def in_the_way(run: RunPath, resumed: RunPath | None, damaged: Sequence[RunPath] = ()) -> list[RunPath]:
    """List the checkpoints in `run` that a run which starts afresh, or from `resumed`, would take for its own.

    But for `damaged` ones, which it passed over."""
    checkpoints = checkpoints_of(run)
    found = [*finished(checkpoints)] if resumed is None else unrelated(checkpoints, resumed)
    return [path for path in found if path.name not in {each.name for each in damaged}]


def check_folder(config: Config, run: RunPath, resumed: RunPath | None, damaged: Sequence[RunPath] = ()) -> None:
    """Refuse a folder that cannot be written to, and one that holds a checkpoint or a report of another run.

    `damaged`: checkpoints that were passed over on the way to `resumed`."""
    resume = config.run.resume
    with naming_run_dir(config):
        check_bucket(run)
        there, writable = (run, True) if isinstance(run, FarPath) else _writable(run)
        others = in_the_way(run, resumed, damaged) if writable else []
        taken = bool(others) or (resume is None and (run / "report.json").is_file())
    if not writable:
        raise TrainerError(
            f"run.dir={config.run.dir}: {there} is not a folder that this user can write to; choose another"
        )
    if not taken or config.run.overwrite:
        return
    if resume is None:
        raise ConfigError(
            f"{run} holds a run already; continue it by run.resume=latest, choose another run.name, "
            "or replace it by run.overwrite=true"
        )
    names = ", ".join(path.name for path in others)
    raise ConfigError(
        f"run.resume={resume}: {run} holds checkpoints that do not lead to this one, and would be taken for this "
        f"run's: {names}; continue from the newest by run.resume=latest, choose another run.name, or remove them by "
        "run.overwrite=true"
    )


def _writable(run: Path) -> tuple[Path, bool]:
    """The folder of the run, or the nearest one above it that is there, and whether this user can write to it."""
    there = next(each for each in (run, *run.parents) if each.exists())
    return there, there.is_dir() and os.access(there, os.W_OK | os.X_OK)


@contextmanager
def naming_run_dir(config: Config) -> Iterator[None]:
    """Turn an OSError of the block into a ConfigError that names run.dir."""
    try:
        yield
    except BucketNotFoundError as failure:
        raise ConfigError(f"run.dir={config.run.dir}: {failure}") from failure
    except (OSError, StorageError) as failure:
        raise TrainerError(f"run.dir={config.run.dir} cannot be used: {failure}; choose another") from failure
