"""python -m serving: answer requests with a published model, and manage its versions."""

from featurestore.console.commandline import CommandApp, run_app
from serving import commands

app = CommandApp(
    help="Answer requests with a published model, and manage its versions.",
    epilog="Examples:\n\n- `crossmedia serve data/models/ctr --port 8080`\n\n- `crossmedia model log data/models/ctr`",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(commands.app)


def main() -> None:
    """Run `python -m serving`."""
    run_app(app, "python -m serving")


if __name__ == "__main__":
    main()
