"""python -m serving: answer requests with a published model, and manage its versions."""

from pathlib import Path
from typing import Any

from featurestore.console.commandline import USAGE_ERROR, CommandApp, CommandGroup, run_app
from serving import commands


class ServingGroup(CommandGroup):
    """Serves the model that the first word names if it is not a command: `python -m serving data/models/ctr`.

    If the first word is an option of the command serve, serve is assumed: `python -m serving --port 8080 MODEL`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the command serve before its options."""
        of_serve = {name for option in self.commands["serve"].params for name in option.opts}
        is_option = bool(args) and args[0].startswith("-") and args[0].partition("=")[0] in of_serve
        return super().parse_args(ctx, ["serve", *args] if is_option else args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command. A first word that is neither a command nor a path is a mistyped command."""
        word = args[0]
        is_place = "/" in word or Path(word).exists()
        try:
            return super().resolve_command(ctx, ["serve", *args] if is_place and word not in self.commands else args)
        except USAGE_ERROR as error:
            ctx.fail(f"{error.message} Nor is {word} a folder here; give the folder or address of a published model")


app = CommandApp(
    cls=ServingGroup,
    help="Answer requests with a published model, and manage its versions.\n\n"
    "The command serve may be left out: `python -m serving MODEL` is `python -m serving serve MODEL`. "
    "Its options may come before or after it.",
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
