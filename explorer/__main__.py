"""python -m explorer: pages of a store, its images, runs, impressions and a scorer, served or written into a folder."""

from typing import Any

from typer.core import TyperGroup

from explorer.commands import export, map, serve
from featurestore.console.commandline import CommandApp, run_app


class ExplorerGroup(TyperGroup):
    """Serves where no command is named: `python -m explorer --store data/features`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command before its options."""
        is_bare = bool(args) and args[0].startswith("-") and args[0] not in ("-h", "--help")
        return super().parse_args(ctx, ["serve", *args] if is_bare else args)


app = CommandApp(
    cls=ExplorerGroup,
    help="Show pages of a store, its images, runs, impressions and a scorer, in a browser.\n\n"
    "Without a command the pages are served: `python -m explorer --store STORE` is "
    "`python -m explorer serve --store STORE`.",
    epilog="Examples:\n\n"
    "- `python -m explorer --store data/features --runs data/runs --images photos`\n\n"
    "- `python -m explorer export pages --store data/features --runs data/runs --images photos`\n\n"
    "- `python -m explorer map map.parquet --run data/runs/both`",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for commands in (serve, export, map):
    app.add_typer(commands.app)


def main() -> None:
    """Run `python -m explorer`."""
    run_app(app, "python -m explorer")


if __name__ == "__main__":
    main()
