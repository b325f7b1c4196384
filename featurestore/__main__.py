"""python -m featurestore: show a store and its history, check its files, and serve it."""

from featurestore.commands import check, history, look
from featurestore.console.commandline import CommandApp, run_app

app = CommandApp(
    help="Look at a feature store, go through its history, check every file, serve it.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for commands in (look, history, check):
    app.add_typer(commands.app)


def main() -> None:
    """Run `python -m featurestore`."""
    run_app(app, "python -m featurestore")


if __name__ == "__main__":
    main()
