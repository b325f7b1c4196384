"""What the commands of the trainer and the jobs on its runs share: they connect, work, close, tell mistakes in a line.

Exit codes: 0 done, 1 failed, 2 wrong settings, 130 stopped by a signal after a checkpoint. Quick to import: torch and
Horovod are loaded when the ranks connect.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated

import typer

from featurestore.console.commandline import FAILED, OK, STOPPED, USAGE, say_error
from trainer.errors import ConfigError, LostRankError, RemoteRankError, SchemaError, TrainerError

if TYPE_CHECKING:
    from trainer.comm import Comm

# horovodrun ends the other ranks when the first one fails: rank 0 has to be given the time to say why.
_GRACE_S = 1.0

WhichCheckpoint = Annotated[
    str | None, typer.Option(help="A step, or the path of a checkpoint.", show_default="the newest")
]
"""The option --checkpoint of a job that reads a trained run."""


def run_on_ranks(work: Callable[["Comm"], None], missing_key_advice: str = "") -> int:
    """Does `work` on the ranks that horovodrun started, or on one alone; returns the exit code.

    What goes wrong is told once, by rank 0; where an image had no feature, `missing_key_advice` follows.
    """
    from trainer.comm import connect

    try:
        comm = connect()
    except TrainerError as failure:
        _tell(failure)
        return FAILED
    with contextlib.closing(comm):
        code = _guarded(comm, work, missing_key_advice)
    if comm.is_stuck:  # a collective of Horovod is under way for ever, and Python's end would wait for it
        sys.stdout.flush()
        os._exit(code)
    return code


@contextlib.contextmanager
def failures_told() -> Iterator[None]:
    """Ends a job on one rank with 1 and one line where the trainer or a feature store raises an error of its own."""
    from featurestore.errors import FeatureStoreError

    try:
        yield
    except (TrainerError, FeatureStoreError) as error:
        say_error(error)
        raise typer.Exit(FAILED) from error


def check_ending(out: str, *endings: str) -> None:
    """Raises typer.BadParameter unless the file of --out has a name with one of these endings."""
    if PurePosixPath(out).suffix not in endings:
        raise typer.BadParameter(
            f"{out} has to end with {' or '.join(endings)}, a name before that", param_hint="--out"
        )


def _guarded(comm: "Comm", work: Callable[["Comm"], None], missing_key_advice: str) -> int:
    from featurestore.errors import FeatureStoreError
    from trainer.loop.signals import StoppedError

    try:
        work(comm)
    except StoppedError:
        return STOPPED
    except (TrainerError, FeatureStoreError) as failure:
        if comm.rank == 0 or isinstance(failure, LostRankError):  # rank 0 may be the one that is gone
            _tell(failure)
            if missing_key_advice and _is_missing_key(failure):
                print(missing_key_advice, file=sys.stderr, flush=True)
        else:
            time.sleep(_GRACE_S)
        return USAGE if isinstance(failure, ConfigError | SchemaError) else FAILED
    return OK


def _is_missing_key(failure: Exception) -> bool:
    """Whether this rank, or the one whose error was sent here, found an image without a feature."""
    from featurestore.errors import MissingKeysError

    name = failure.text.partition(":")[0] if isinstance(failure, RemoteRankError) else type(failure).__name__
    return name == MissingKeysError.__name__


def _tell(failure: Exception) -> None:
    text = failure.text if isinstance(failure, RemoteRankError) else str(failure)
    where = f"rank {failure.rank}: " if isinstance(failure, RemoteRankError) else ""
    say_error(f"{where}{text}")
