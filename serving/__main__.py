"""python -m serving: answer requests with a published model, and look at its versions."""

from featurestore.console.commandline import CommandApp, run_app
from serving.commands import bundle

app = CommandApp(
    help="Answer requests with a published model, and look at its versions.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for commands in (bundle,):
    app.add_typer(commands.app)


def main() -> None:
    """Run `python -m serving`."""
    run_app(app, "python -m serving")


if __name__ == "__main__":
    main()
