"""A run's folder: its files and its checkpoints."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from featurestore.errors import BucketNotFoundError, StorageError
from featurestore.parsing import parse_json
from featurestore.published.paths import RemotePath, RunPath, check_bucket, read_file, run_path
from featurestore.published.versions import PublishedFiles, open_published
from trainer.config import Config, RunConfig
from trainer.errors import CheckpointNotFoundError, ConfigError, TrainerError
from trainer.problems import Problem

STATE = "state.json"
TENSORBOARD = "tensorboard"
"""The folder of a run that has TensorBoard's files."""
DAYS_FILE = "daily.json"
"""File of the settings that the runs of a daily training share; their folders are next to it."""
_NAME = re.compile(r"step-\d{8,}")

PathT = TypeVar("PathT", Path, RemotePath, Path | RemotePath)


def checkpoints_of(run: PathT) -> PathT:
    """Return the folder of the checkpoints of the run in folder `run`."""
    return run / "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of the run in folder `run`; its text is an address that every option takes.

    `files`: the version of RUN/checkpoints that it was found in, from which it is read. Where a later version does not
    have it, an object store keeps its files for a while, and a disk does not.
    """

    run: RunPath
    name: str
    files: PublishedFiles = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"{checkpoints_of(self.run)}/{self.name}"

    @property
    def step(self) -> int:
        """Return the number of steps of its run."""
        return step_of(self.name)

    @property
    def identity(self) -> str:
        """Return a text that no other checkpoint has, also none of the same step and path."""
        return self.path(STATE)

    def is_of(self, run: RunPath) -> bool:
        """Return whether it is one of the checkpoints of the run in this folder, maybe by another path to it."""
        return checkpoints_of(self.run).resolve() == checkpoints_of(run).resolve()

    def path(self, file: str) -> str:
        """Return the path or address at which a file of it lies."""
        return self.files.full(f"{self.name}/{file}")

    def read_bytes(self, file: str) -> bytes:
        """Read a file of it. Raises FileNotFoundError, StorageError."""
        return self.files.read_bytes(f"{self.name}/{file}")

    def open_input(self, file: str) -> IO[bytes]:
        """Open a file of it for reading, seekable. Raises FileNotFoundError, StorageError."""
        return self.files.open_input(f"{self.name}/{file}")


def run_or_newest(run: str | None, folder: Path = Path(RunConfig().dir)) -> RunPath:
    """Return the path of a run that an option names, by default of the one whose checkpoints changed last.

    That is searched for in `folder` and the folders in it, as those of trainer.daily. Raises ConfigError where there is
    none.
    """
    if run is not None:
        return run_path(run)
    listed = [finished(each.parent) for each in folder.glob(f"**/{checkpoints_of(Path())}")]
    newest = [checkpoints[-1] for checkpoints in listed if checkpoints]
    if not newest:
        raise ConfigError(Problem.NO_TRAINED_RUN, folder)
    return max(newest, key=lambda each: each.files.published.time_s).run


def find_checkpoint(run: RunPath, name: str | None = None, setting: str = "--checkpoint ") -> Checkpoint:
    """Find a checkpoint of the run in folder `run`: the newest, or that of `name`.

    `name`: latest, a step, step-N, or RUN/checkpoints/step-N of any run. Raises CheckpointNotFoundError; it names the
    `setting`, an option with its = or its space, that gave the name.
    """
    found = finished(run)
    if not found:
        check_bucket(run)
    if name in (None, "latest"):
        if not found:
            asked = f"{setting}{name}: " if name else ""
            by = f": crossmedia train --config {run / 'config.yaml'}" if (run / "config.yaml").is_file() else ""
            raise CheckpointNotFoundError(Problem.RUN_WITHOUT_CHECKPOINT, asked, run, checkpoints_of(run), by)
        return found[-1]
    wanted = step_name(int(name)) if name.isdecimal() else name
    chosen = next((each for each in found if each.name == wanted), None) or checkpoint_at(run_path(name))
    if chosen is not None:
        return chosen
    check_bucket(run_path(name))
    names = ", ".join(each.name for each in found) or "none"
    raise CheckpointNotFoundError(Problem.NO_SUCH_CHECKPOINT, setting, name, checkpoints_of(run), names)


def checkpoint_at(path: RunPath) -> Checkpoint | None:
    """Return the checkpoint that the path RUN/checkpoints/step-N means; None where there is no such checkpoint."""
    run = path.parent.parent
    if path != checkpoints_of(run) / path.name:
        return None
    return next((each for each in finished(run) if each.name == path.name), None)


def report_of(run: RunPath) -> dict[str, Any] | None:
    """Read the run's report.json; None before its end. Raises TrainerError where it cannot be read."""
    file = run / "report.json"
    try:
        report: dict[str, Any] = parse_json(read_file(file))
    except FileNotFoundError:
        return None
    except (OSError, StorageError, ValueError) as failure:
        raise TrainerError(Problem.REPORT_UNREADABLE, file, failure) from failure
    return report


def step_name(step: int) -> str:
    """Name the checkpoint of a step."""
    return f"step-{step:08}"


def step_of(name: str) -> int:
    """Read the step from the name of a checkpoint."""
    return int(name.removeprefix("step-"))


def finished(run: RunPath) -> list[Checkpoint]:
    """List the checkpoints of the run in folder `run`, oldest first. Raises CorruptFileError, StorageError."""
    files = open_published(str(checkpoints_of(run)))
    if not isinstance(files, PublishedFiles):
        return []
    found = [Checkpoint(run, name, files) for name in files.list() if _NAME.fullmatch(name)]
    return sorted(found, key=lambda each: each.step)


def conflicting_checkpoints(
    run: RunPath, resumed: Checkpoint | None, damaged: Sequence[Checkpoint] = ()
) -> list[Checkpoint]:
    """List the checkpoints in `run` that a run which starts afresh, or from `resumed`, would take for its own.

    Those are the checkpoints of later steps, or all where `resumed` is not one of this folder; oldest first, and
    without the `damaged` ones, which it skipped."""
    last = resumed.step if resumed is not None and resumed.is_of(run) else -1
    return [each for each in finished(run) if each.step > last and each not in damaged]


def check_folder(config: Config, run: RunPath, resumed: Checkpoint | None, damaged: Sequence[Checkpoint] = ()) -> None:
    """Refuse a folder that cannot be written to, and one that holds a checkpoint or a report of another run.

    `damaged`: checkpoints that were skipped on the way to `resumed`."""
    resume = config.run.resume
    with run_dir_errors(config):
        check_bucket(run)
        there, writable = (run, True) if isinstance(run, RemotePath) else _writable(run)
        others = conflicting_checkpoints(run, resumed, damaged) if writable else []
        taken = bool(others) or (resume is None and (run / "report.json").is_file())
    if not writable:
        raise ConfigError(Problem.RUN_DIR_READ_ONLY, config.run.dir, there)
    if not taken or config.run.overwrite:
        return
    if resume is None:
        raise ConfigError(Problem.RUN_EXISTS, run)
    names = ", ".join(each.name for each in others)
    raise ConfigError(Problem.RUN_HAS_LATER_CHECKPOINTS, resume, run, names)


def _writable(run: Path) -> tuple[Path, bool]:
    """The folder of the run, or the nearest one above it that is there, and whether this user can write to it."""
    there = next(each for each in (run, *run.parents) if each.exists())
    return there, there.is_dir() and os.access(there, os.W_OK | os.X_OK)


@contextmanager
def run_dir_errors(config: Config) -> Iterator[None]:
    """Turn an OSError of the block into a ConfigError that names run.dir."""
    try:
        yield
    except BucketNotFoundError as failure:
        raise ConfigError(Problem.SETTING_WRONG, "run.dir", config.run.dir, failure) from failure
    except (OSError, StorageError) as failure:
        raise TrainerError(Problem.RUN_DIR_UNUSABLE, config.run.dir, failure) from failure
