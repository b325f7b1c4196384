"""The run that is supervised: the command that trains it, its newest checkpoint, and one supervisor for it."""

import fcntl
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from typer.main import get_command

from featurestore.console.commandline import CommandApp, say_error
from featurestore.errors import StorageError
from featurestore.published.paths import FarPath, RunPath, run_path
from featurestore.storage.storage import Storage
from featurestore.text import printable
from trainer.config.config import Config, load_config
from trainer.errors import ConfigError, TrainerError
from trainer.main import app, warm_settings
from trainer.runs.folder import finished

_MAIN, _DAILY = "trainer.main", "trainer.daily"
_PROGRAM, _COMMANDS = "crossmedia", {"train": _MAIN, "daily": _DAILY}
_EXAMPLE = f"{_PROGRAM} train --set run.name=NAME"


@dataclass(frozen=True)
class TrainCommand:
    """`crossmedia train ARGUMENTS`, `crossmedia daily ARGUMENTS`, these by their modules, or a script that trains."""

    words: tuple[str, ...]
    folder: RunPath
    """Of the run or, of trainer.daily, of the days' runs."""
    is_daily: bool = False

    def newest_step(self) -> int:
        """Return the step of the run's newest checkpoint, 0 where it has none; of days, the sum over all days."""
        if not self.is_daily:
            return _newest_step(self.folder)
        from trainer.daily import day_folders

        return sum(_newest_step(day) for day in day_folders(self.folder))

    def start(self) -> list[str]:
        """Return the command line that begins the run or, where it has a checkpoint, continues it.

        A bare `python` is this one, and `crossmedia` is of this one: a service and ssh have other search paths than a
        terminal.
        """
        first, *words = self.words
        by_python = {"python": (), "python3": (), _PROGRAM: ("-m", _PROGRAM)}
        program = [sys.executable, *by_python[first]] if first in by_python else [first]
        return [*program, *words, *([] if self.is_daily else ["--set", "run.resume=auto"])]


def parse_command(words: Sequence[str]) -> TrainCommand:
    """Find out which run a command trains. Raises ConfigError where its settings are wrong, or not ours to restart."""
    module, arguments = _module_and_arguments(words)
    if module == _DAILY:
        from trainer.daily import app as daily
        from trainer.daily import folder_of

        return TrainCommand(tuple(words), folder_of(_config_of(daily, module, arguments)), is_daily=True)
    run = _config_of(app, module, arguments).run
    if run.name is None:
        raise ConfigError("run.name is not set, so a second start would not find the run; add --set run.name=NAME")
    if run.overwrite or run.resume not in (None, "latest", "auto"):
        raise ConfigError(
            "a supervised run continues from its newest checkpoint: leave run.resume and run.overwrite out"
        )
    return TrainCommand(tuple(words), run_path(run.dir) / run.name)


def _module_and_arguments(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the module, that of a script being trainer.main, and what follows it."""
    for place, word in enumerate(words):
        if Path(word).name in ("horovodrun", "torchrun"):
            raise ConfigError(f"{word} is not needed: the supervisor starts the ranks; write -- {_EXAMPLE}")
        if word.endswith(".py"):
            return _MAIN, words[place + 1 :]
        if word in (_MAIN, _DAILY) and words[place - 1] == "-m":
            return word, words[place + 1 :]
        if Path(word).name == _PROGRAM and (module := _COMMANDS.get("".join(words[place + 1 : place + 2]))):
            return module, words[place + 2 :]
    raise ConfigError(
        f"'{' '.join(words)}' is not {' or '.join(f'{_PROGRAM} {each}' for each in _COMMANDS)}; write -- {_EXAMPLE}"
    )


def _config_of(command: CommandApp, module: str, arguments: Sequence[str]) -> Config:
    """Load the settings that the command is given. Raises ConfigError."""
    given = get_command(command).make_context(module, list(arguments)).params
    settings = [*(given["settings"] or []), *(given["more"] or [])]
    settings += warm_settings(given["warm_start"], given.get("warm_parts"))
    return load_config(given["file"], settings)


def _newest_step(run: RunPath) -> int:
    found = finished(run)
    return found[-1].step if found else 0


LEASE_S = 60.0
"""Seconds without a renewal after which a supervisor on another machine counts as gone."""


@contextmanager
def claimed(folder: RunPath, lease_s: float = LEASE_S) -> Iterator[None]:
    """Hold the run in `folder`: by a lock that ends with this process or, on an object store, by a lease.

    Raises ConfigError where another supervisor has it, else TrainerError. On an object store, SIGTERM comes to this
    process where another one has taken the run over.
    """
    file = folder.parent / f".{folder.name}.supervised"
    with _lease(file, lease_s) if isinstance(file, FarPath) else _lock(file):
        yield


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(file.open("a+", encoding="utf-8", errors="replace"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as failure:
            lock.seek(0)
            raise _held(file, lock.read(200).strip()) from failure
        except OSError as failure:
            raise TrainerError(f"{file} cannot be written: {failure}; choose another run.dir") from failure
        lock.truncate(0)
        lock.write(f"{_me()}\n")
        lock.flush()
        yield


@contextmanager
def _lease(folder: FarPath, lease_s: float) -> Iterator[None]:
    """Hold the claim of the highest number in `folder`; it is renewed in a thread, and ends after the block.

    Then it is left there, empty: were its number given again, a process that was away would take it for its own claim.
    """
    storage, ended = Storage(folder.url), threading.Event()
    claims = storage.list()
    if claims and (holder := _holder(storage, claims[-1], lease_s)):
        raise _held(folder, f"{holder}, or was until less than {lease_s:g} s ago")
    mine = f"{int(claims[-1]) + 1 if claims else 1:020}"
    if not storage.create_exclusive(mine, _me().encode()):
        raise _held(folder, "one that began at the same moment")

    def renew() -> None:
        while not ended.wait(lease_s / 4):
            with suppress(OSError, StorageError):  # the store is away: nobody else can take the run either
                if (newest := storage.list()[-1:]) != [mine]:
                    other = storage.read_bytes(newest[0]).decode(errors="replace") if newest else ""
                    say_error(
                        f"the run is supervised by {printable(other) or 'another one'} now: this supervisor stops"
                    )
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                storage.write_bytes(mine, _me().encode())

    renewing = threading.Thread(target=renew, daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        is_newest = storage.list()[-1:] == [mine]
        if is_newest:
            storage.write_bytes(mine, b"")
        storage.delete_files([*claims, *([] if is_newest else [mine])])


def _holder(storage: Storage, claim: str, lease_s: float) -> str | None:
    """Return who holds a claim; None if it was given back, has expired, or its process here has ended."""
    with suppress(FileNotFoundError):
        holder = printable(storage.read_bytes(claim).decode(errors="replace")[:200])
        if holder and storage.now() - storage.entry(claim).mtime_s < lease_s and not _is_gone(holder):
            return holder
    return None


def _me() -> str:
    return f"process {os.getpid()} on {os.uname().nodename}"


def _is_gone(holder: str) -> bool:
    """Return whether the holder was a process of this machine that has ended, perhaps with this one's number."""
    match = re.fullmatch(r"process (\d{1,10}) on (.+)", holder)
    if match is None or match[2] != os.uname().nodename:
        return False
    return holder == _me() or not Path(f"/proc/{match[1]}").exists()


def _held(file: RunPath, holder: str) -> ConfigError:
    run = file.parent / file.name.removeprefix(".").removesuffix(".supervised")
    return ConfigError(f"{run} is supervised already, by {holder}; end that first")
