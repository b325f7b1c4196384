"""The command crossmedia: all commands under one name, each loaded when it is called.

A command is the `app` of a module that can be started alone as well, e.g. `python -m trainer.main`: its options, its
messages and its exit codes are the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

from typer.core import TyperCommand

from featurestore.console.commandline import CommandApp, CommandGroup, command_of, run_app

PROGRAM = "crossmedia"


@dataclass(frozen=True)
class Entry:
    """A command: a line for the list of commands, and the modules whose apps it is made of.

    `commands` are those that it takes of the apps, all by default; `is_group`: they are called by a further word.
    """

    summary: str
    modules: tuple[str, ...]
    commands: tuple[str, ...] = ()
    is_group: bool = False
    help: str | None = None


START, IMAGES, SAMPLES, TRAINING = "Start", "Images and features", "Samples", "Training"
RESULTS, SERVING, RETRIEVAL, VIEWS = "Results", "Models in use", "Pre-ranking", "Look and plan"
MODEL_COMMANDS = ("info", "log", "use", "expire", "check")
GROUPS: dict[str, dict[str, Entry]] = {
    START: {
        "demo": Entry("Try all of it on drawn clothes: data, four trainings, a scorer.", ("crossmedia.demo",)),
        "demo-data": Entry("Draw the images and the logs of the demo.", ("jobs.make_demo_data",)),
    },
    IMAGES: {
        "extract": Entry("Compute the feature of every image once.", ("jobs.extract_features",)),
        "refresh": Entry("Compute the features of new and changed images.", ("jobs.refresh_features",)),
        "import": Entry("Import vectors of another encoder.", ("jobs.import_features",)),
        "store": Entry("Look at a store, go through its history, check, serve it.", ("featurestore.__main__",)),
    },
    SAMPLES: {
        "schema": Entry("Suggest a mapping or schema of data, and check it.", ("trainer.schema.__main__",)),
        "samples": Entry("Make the trainer's input from logs.", ("jobs.build_samples",)),
        "import-xdl": Entry("Import samples of XDL.", ("jobs.import_xdl",)),
    },
    TRAINING: {
        "train": Entry("Train a model on IDs and images.", ("trainer.main",)),
        "tune": Entry("Find rates and epochs on the last training days.", ("trainer.tune",)),
        "daily": Entry("Train on the days that are new.", ("trainer.daily",)),
        "supervise": Entry("Train, and start again where a rank or host dies.", ("trainer.supervise",)),
        "slurm": Entry("Run a command on the ranks of a Slurm job.", ("trainer.launch",)),
    },
    RESULTS: {
        "evaluate": Entry("Measure a run, or compare it with another.", ("trainer.evaluate",)),
        "score": Entry("Score samples with a run or a model, into a file.", ("jobs.score",)),
        "export": Entry("Write the 12 numbers of every image.", ("jobs.export_embeddings",)),
        "compat": Entry("Check whether a run may use another store.", ("trainer.compat",)),
    },
    SERVING: {
        "publish": Entry("Publish a run as the next version of a model.", ("jobs.export_model",)),
        "publish-vectors": Entry("Give new images their 12 numbers, without a training.", ("jobs.publish_vectors",)),
        "serve": Entry("Answer requests with a published model.", ("serving.__main__",), ("serve",)),
        "model": Entry(
            "Look at the versions of a model, and choose one.",
            ("serving.__main__",),
            MODEL_COMMANDS,
            is_group=True,
            help="Look at the versions of a published model, compare one with its run, and choose the one in use.",
        ),
    },
    RETRIEVAL: {
        "index": Entry(
            "Make an index of ads, and search it.",
            ("trainer.prerank.__main__",),
            is_group=True,
            help="Make an index of ads of a run with two towers, measure it, and search it.",
        )
    },
    VIEWS: {
        "explore": Entry("Show stores, images, runs and scores in a browser.", ("explorer.__main__",)),
        "plan": Entry("Estimate a run's needs and speed on more machines.", ("trainer.plan",)),
    },
}
ENTRIES = {name: entry for group in GROUPS.values() for name, entry in group.items()}
EXAMPLES = """Examples:
  crossmedia demo
  crossmedia extract --images photos --store data/features -n 4
  horovodrun -np 8 crossmedia train --config data/samples/settings.yaml
  crossmedia serve data/models/ctr --port 8080

Each command has a --help with examples. Option --install-completion: the shell completes commands and options from then
on. In Python: import crossmedia as cm.
"""


def apps_of(entry: Entry) -> list[CommandApp]:
    """Import the apps of a command."""
    return [cast("CommandApp", import_module(module).app) for module in entry.modules]


def load(name: str) -> Any:
    """Return the click command with this name, of the apps of its modules. Raises KeyError."""
    entry = ENTRIES[name]
    found: dict[str, Any] = {}
    for app in apps_of(entry):
        command = command_of(app)
        if not entry.commands and not entry.is_group:
            return command
        subcommands = getattr(command, "commands", {})
        found |= {each: subcommands[each] for each in entry.commands or subcommands}
    if not entry.is_group:
        (command,) = found.values()
        return command
    return CommandGroup(
        name=name, help=entry.help, commands=found, no_args_is_help=True, rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip


def listed() -> Iterator[tuple[str, TyperCommand]]:
    """Yield a command with its line and no options for each name: enough to list them, and nothing is imported."""
    for panel, entries in GROUPS.items():
        for name, entry in entries.items():
            yield name, TyperCommand(name, help=entry.summary, rich_help_panel=panel)


class FrontGroup(CommandGroup):
    """Knows all commands by name and line, and loads one when it is called."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = dict(listed())

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Load the command that the first word names."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None else load(name), rest


app = CommandApp(
    cls=FrontGroup,
    completion=True,
    help="Train and serve click-through-rate models on IDs and images.",
    epilog=EXAMPLES,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def front() -> None:
    """Give the app a function: its options are those of the group alone."""


def main() -> None:
    """Run the console script crossmedia."""
    run_app(app, PROGRAM)
