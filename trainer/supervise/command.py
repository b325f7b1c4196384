"""The command that is supervised: which run it trains, or which days, and how it is started again to continue."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import strftime

from typer.main import get_command

from featurestore.console.commandline import CommandApp
from featurestore.published.paths import RunPath, run_path
from trainer.config.config import Config, load_config
from trainer.errors import ConfigError
from trainer.files import checkpoints_of
from trainer.main import app, warm_settings
from trainer.runs.folder import finished, step_of

_MAIN, _DAILY = "trainer.main", "trainer.daily"
_EXAMPLE = f"python -m {_MAIN} --set run.name=NAME"


@dataclass(frozen=True)
class TrainCommand:
    """`python -m trainer.main ARGUMENTS`, or a script with the same arguments, and the run that it trains."""

    words: tuple[str, ...]
    folder: RunPath
    """The run's folder."""
    name_was_given: bool

    def newest_step(self) -> int:
        """Return the step of the run's newest checkpoint; 0 where it has none."""
        return _newest_step(self.folder)

    def start(self) -> list[str]:
        """Return the command line that begins the run or, where it has a checkpoint, continues it.

        A bare `python` is this one: a service and ssh have other search paths than a terminal.
        """
        name = [] if self.name_was_given else ["--set", f"run.name={self.folder.name}"]
        return [*self._words(), *name, "--set", "run.resume=auto"]

    def _words(self) -> list[str]:
        program = sys.executable if self.words[0] in ("python", "python3") else self.words[0]
        return [program, *self.words[1:]]


@dataclass(frozen=True)
class DaysCommand(TrainCommand):
    """`python -m trainer.daily ARGUMENTS`, which continues by itself: `folder` has a run for each day."""

    _before: dict[str, int] = field(default_factory=dict, compare=False)
    """Steps of the days before the newest one: they do not change any more."""

    def newest_step(self) -> int:
        """Return the steps of the newest checkpoints of all days, together."""
        from trainer.daily.table import day_folders

        steps = dict(self._before)
        for day in day_folders(self.folder):
            if day.name not in steps:
                steps[day.name] = _newest_step(day)
        self._before.update(sorted(steps.items())[:-1])
        return sum(steps.values())

    def start(self) -> list[str]:
        return self._words()


def parse_command(words: Sequence[str]) -> TrainCommand:
    """Find out which run a command trains. Raises ConfigError where its settings are wrong, or not ours to restart."""
    module, arguments = _module_and_arguments(words)
    if module == _DAILY:
        from trainer.daily.__main__ import app as daily
        from trainer.daily.__main__ import folder_of

        return DaysCommand(tuple(words), folder_of(_config_of(daily, module, arguments)), name_was_given=True)
    run = _config_of(app, module, arguments).run
    if run.resume not in (None, "latest", "auto"):
        raise ConfigError(
            f"run.resume={run.resume}: a supervised run continues from its newest checkpoint; leave it out"
        )
    if run.overwrite:
        raise ConfigError("run.overwrite=true would remove what a supervised run continues from; take another run.name")
    name = run.name or strftime("run-%Y%m%d-%H%M%S")
    return TrainCommand(tuple(words), run_path(run.dir) / name, name_was_given=run.name is not None)


def _config_of(command: CommandApp, module: str, arguments: Sequence[str]) -> Config:
    """Load the settings that the command is given. Raises ConfigError."""
    given = get_command(command).make_context(module, list(arguments)).params
    settings = [*(given["settings"] or []), *(given["more"] or [])]
    settings += warm_settings(given["warm_start"], given.get("warm_parts"))
    return load_config(given["file"], settings)


def _newest_step(run: RunPath) -> int:
    found = finished(checkpoints_of(run))
    return step_of(found[-1]) if found else 0


def _module_and_arguments(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the module, that of a script being trainer.main, and what follows it."""
    program = Path(words[0]).name
    if program in ("horovodrun", "torchrun"):
        raise ConfigError(f"{program} is not needed: trainer.supervise starts the ranks; write -- {_EXAMPLE}")
    for place, word in enumerate(words):
        if word.endswith(".py"):
            return _MAIN, words[place + 1 :]
        if word == "-m" and len(words) > place + 1:
            module = words[place + 1]
            if module not in (_MAIN, _DAILY):
                raise ConfigError(
                    f"-m {module}: what is supervised is trainer.main or trainer.daily; write -- {_EXAMPLE}"
                )
            return module, words[place + 2 :]
    raise ConfigError(f"'{' '.join(words)}' trains no run; write -- {_EXAMPLE}")
