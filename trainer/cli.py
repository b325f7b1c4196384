"""Commands on ranks: connect, work, print one message for an error, and return the exit code.

Exit codes as of every command (`featurestore.console.commandline`); 130 also for a stop by a signal after a checkpoint.
Quick to import: torch and Horovod are loaded when the ranks connect.
"""

import atexit
import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurestore.commands import WHICH, read_version_name
from featurestore.console.commandline import OK, STOPPED, say_error
from featurestore.console.page import current_page
from featurestore.errors import FAILED, UserError
from trainer.errors import LostRankError
from trainer.problems import Problem

if TYPE_CHECKING:
    from trainer.comm import Comm

# A launcher ends the other ranks when the first one fails: rank 0 needs time to print the reason.
_GRACE_S = 1.0


def counts_of(text: str) -> tuple[int, ...]:
    """Parse the value of an option with counts, as 8,20,40, ascending. Raises BadParameter."""
    found = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(found) < 1:
        raise typer.BadParameter(Problem.NOT_COUNTS.of(text))
    return tuple(sorted(set(found)))


SettingsFile = Annotated[Path | None, typer.Option("--config", help="YAML file with settings that replace defaults.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="One setting; may be repeated.")
]
MoreSettings = Annotated[list[str] | None, typer.Argument(metavar="SECTION.FIELD=VALUE", help="More settings.")]
"""The options, and arguments, of a command that takes settings of a run."""
WhichRun = Annotated[
    str | None, typer.Option(help="Folder or address of a run.", show_default="the newest in data/runs")
]
"""The option --run of a job that reads a trained run."""
WhichCheckpoint = Annotated[
    str | None, typer.Option(help="A step, or the path of a checkpoint.", show_default="the newest")
]
"""The option --checkpoint of a job that reads a trained run."""
StoreVersion = Annotated[
    Any,  # a VersionName: typer knows no unions
    typer.Option(
        parser=read_version_name,
        metavar=WHICH,
        help="Snapshot of the (first) feature store, or a channel of it.",
        show_default="the newest",
    ),
]
"""The option --store-version of a job that reads features."""


@dataclass(frozen=True, kw_only=True)
class GateLimits:
    """Limits of the gates of `crossmedia compat`, and of the gates for a new model."""

    min_coverage: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the impressions' images with a feature.")
    ] = 0.99
    max_gauc_loss: Annotated[float, typer.Option(min=0, help="By how much GAUC may fall, beyond noise.")] = 0.002
    max_logloss_rise: Annotated[float, typer.Option(min=0, help="By how much log loss may rise, beyond noise.")] = 0.002


def run_on_ranks(work: Callable[["Comm"], object], deadline_s: float | None = None) -> int:
    """Do `work` on the ranks that horovodrun or torchrun started, or on one alone; returns the exit code.

    The ranks wait up to `deadline_s` for each other. Only rank 0 prints the error, and fills the page of the command.
    Errors other than ours propagate, after the ranks were left.
    """
    from featurestore.console.memory import keep_freed_memory
    from trainer.comm import connect

    keep_freed_memory()
    try:
        comm = connect() if deadline_s is None else connect(deadline_s)
    except UserError as failure:
        say_error(failure)
        return failure.exit_code
    with contextlib.closing(comm):
        code = _code_of(comm, work)
    if comm.is_stuck:  # a collective never ends, and Python's exit would wait for it
        sys.stdout.flush()
        os._exit(code)
    return code


@functools.cache
def joined_ranks() -> "Comm":
    """Return the ranks of horovodrun or torchrun, or this process alone: for a program, until it ends."""
    from trainer.comm import connect

    def leave() -> None:
        comm.close()
        if comm.is_stuck:
            sys.stdout.flush()
            os._exit(FAILED)

    comm = connect()
    atexit.register(leave)
    return comm


def _code_of(comm: "Comm", work: Callable[["Comm"], object]) -> int:
    from trainer.loop.training import StoppedError

    try:
        if page := current_page():
            if comm.rank != 0:
                page.leave_out()
            comm.on_rank_0(page.check_place)
        work(comm)
    except StoppedError:
        return STOPPED
    except UserError as failure:
        if comm.rank == 0 or isinstance(failure, LostRankError):  # rank 0 may be gone
            say_error(failure)
            _leave_for_torchrun(failure)
        else:
            time.sleep(_GRACE_S)
        return failure.exit_code
    except KeyboardInterrupt:
        if comm.rank == 0:
            raise  # the command prints its one line
        return STOPPED
    return OK


def _leave_for_torchrun(failure: UserError) -> None:
    """Leave an error for the report that torchrun ends with, where torchrun started this process."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            text = json.dumps({"message": f"error: {failure}", "timestamp": int(time.time())})
            Path(file).write_text(text, encoding="utf-8")
