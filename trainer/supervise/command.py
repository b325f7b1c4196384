"""The command that is supervised: which run it trains, and how it is started again so that this run goes on."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import strftime

from typer.main import get_command

from featurestore.published.paths import RunPath, run_path
from trainer.config.config import load_config
from trainer.errors import ConfigError
from trainer.main import app, warm_settings
from trainer.runs.folder import finished

_EXAMPLE = "python -m trainer.main --set run.name=NAME"


@dataclass(frozen=True)
class TrainCommand:
    """`python -m trainer.main ARGUMENTS`, or a script with the same arguments, and the run that it trains."""

    words: tuple[str, ...]
    folder: RunPath
    """The run's folder."""
    name_was_given: bool

    def newest_step(self) -> int:
        """Return the step of the run's newest checkpoint; 0 where it has none."""
        names = [each.name for each in finished(self.folder / "checkpoints")]
        return int(names[-1].removeprefix("step-")) if names else 0

    def start(self) -> list[str]:
        """Return the command line that begins the run or, where it has a checkpoint, continues it.

        A bare `python` is this one: a service and ssh have other search paths than a terminal.
        """
        program = sys.executable if self.words[0] in ("python", "python3") else self.words[0]
        name = [] if self.name_was_given else ["--set", f"run.name={self.folder.name}"]
        return [program, *self.words[1:], *name, "--set", "run.resume=auto"]


def parse_command(words: Sequence[str]) -> TrainCommand:
    """Find out which run a command trains. Raises ConfigError where its settings are wrong, or not ours to restart."""
    arguments = list(_arguments(words))
    given = get_command(app).make_context("trainer.main", arguments).params
    settings = [*(given["settings"] or []), *(given["more"] or [])]
    settings += warm_settings(given["warm_start"], given["warm_parts"])
    run = load_config(given["file"], settings).run
    if run.resume not in (None, "latest", "auto"):
        raise ConfigError(f"run.resume={run.resume}: a supervised run goes on from its newest checkpoint; leave it out")
    if run.overwrite:
        raise ConfigError("run.overwrite=true would remove what a supervised run goes on from; take another run.name")
    name = run.name or strftime("run-%Y%m%d-%H%M%S")
    return TrainCommand(tuple(words), run_path(run.dir) / name, name_was_given=run.name is not None)


def _arguments(words: Sequence[str]) -> Sequence[str]:
    """Return what follows the module or the script."""
    program = Path(words[0]).name
    if program in ("horovodrun", "torchrun"):
        raise ConfigError(f"{program} is not needed: trainer.supervise starts the ranks; write -- {_EXAMPLE}")
    for place, word in enumerate(words):
        if word.endswith(".py"):
            return words[place + 1 :]
        if word == "-m" and len(words) > place + 1:
            if words[place + 1] != "trainer.main":
                raise ConfigError(f"-m {words[place + 1]}: what is supervised is trainer.main; write -- {_EXAMPLE}")
            return words[place + 2 :]
    raise ConfigError(f"'{' '.join(words)}' trains no run; write -- {_EXAMPLE}")
