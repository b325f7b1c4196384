"""python -m explorer: pages of a store, images, runs, impressions and a model, served or written into a folder."""

from importlib.util import find_spec
from typing import Any

import typer

from explorer.errors import ExplorerError
from explorer.places import ExplorerSettings, ExportSettings
from explorer.problems import Problem
from featurestore.console.commandline import CommandApp, CommandGroup, run_app, takes
from featurestore.console.output import print_problem, print_summary, progress_bar
from featurestore.errors import FAILED

NEEDED = ("cachetools", "httpx2", "plotly", "python_multipart")
"""Packages that only the explorer needs."""


class ExplorerGroup(CommandGroup):
    """Runs the command serve if no command is given: `python -m explorer --store data/features`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the command serve before its options."""
        is_bare = bool(args) and args[0].startswith("-") and args[0] not in ("-h", "--help")
        return super().parse_args(ctx, ["serve", *args] if is_bare else args)


app = CommandApp(
    cls=ExplorerGroup,
    help="Show pages of a store, its images, runs, impressions and a published model, in a browser.\n\n"
    "Without a command the pages are served: `crossmedia explore --store STORE` is "
    "`crossmedia explore serve --store STORE`.",
    epilog="Examples:\n\n"
    "- `crossmedia explore --store data/features --runs data/runs --images photos`\n\n"
    "- `crossmedia explore export pages --store data/features --runs data/runs --images photos`",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def check_installed() -> None:
    """Raise ExplorerError if a package is missing."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ExplorerError(Problem.NOT_INSTALLED, ", ".join(missing))


@app.command(
    epilog="Examples:\n\n"
    "- `crossmedia explore --store data/features --images photos`\n\n"
    "- `crossmedia explore --store data/features --runs data/runs --samples data/samples --images photos "
    "--model data/models/ctr --port 8090`\n\n"
    "- `crossmedia explore --store s3://shop/features --host 0.0.0.0 --tls-cert tls.crt --tls-key tls.key "
    "--token-file tokens.txt`"
)
@takes(ExplorerSettings)
def serve(settings: ExplorerSettings) -> None:
    """Show pages of a store, its images, runs, impressions and a published model, in a browser. Read-only."""
    check_installed()
    from explorer.server import serve as listen_and_answer

    settings.check()
    listen_and_answer(settings)


@app.command(epilog="Example: `crossmedia explore export pages --store data/features --runs data/runs --images photos`")
@takes(ExportSettings)
def export(settings: ExportSettings) -> None:
    """Write the same pages into a folder, following all links from the first page. Leaves out forms and live parts."""
    check_installed()
    out, most_files = settings.out, settings.most_files
    from explorer.export import export as write
    from explorer.html.site import size

    settings.check()
    with progress_bar("pages and pictures") as bar:
        exported = write(settings, out, most_files, bar, bar.doing)
    print_summary(f"{exported.num_files:,} files, {size(exported.num_bytes)}: open {out / 'index.html'}")
    if exported.num_left_out:
        print_summary(
            f"{exported.num_left_out:,} addresses or more are left out: --most-files takes more than {most_files:,}"
        )
    for problem in exported.errors:
        print_problem(f"an error page: {problem}")
    if exported.errors:
        raise typer.Exit(FAILED)


def main() -> None:
    """Run `python -m explorer`."""
    run_app(app, "python -m explorer")


if __name__ == "__main__":
    main()
