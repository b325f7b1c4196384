"""python -m explorer: pages of a store, images, runs, impressions and a model, served or written into a folder."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from explorer.errors import ExplorerError
from featurestore.console.commandline import CommandApp, CommandGroup, run_app
from featurestore.console.output import print_problem, print_summary, progress_bar
from featurestore.errors import FAILED
from featurestore.published.paths import run_path

NEEDED = ("httpx2", "plotly", "python_multipart", "sklearn")
"""Packages that only the explorer needs."""

Store = Annotated[str | None, typer.Option(help="Feature store: a folder or s3:// address.")]
Runs = Annotated[str | None, typer.Option(help="Folder or address that holds runs.")]
Samples = Annotated[str | None, typer.Option(help="Samples; by default each run's own.")]
Images = Annotated[str | None, typer.Option(help="Pictures: the folder or address that the store was made of.")]
Model = Annotated[str | None, typer.Option(help="Published model: a folder or s3:// address.")]
Nets = Annotated[
    str | None,
    typer.Option(
        metavar="PACKAGE",
        help="Package whose classes runs may use as model.base. A page that opens such a run imports it.",
        show_default="none is imported",
    ),
]


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
        raise ExplorerError(
            f"the explorer needs packages that are not installed here ({', '.join(missing)}): "
            "pip install 'crossmedia[explorer]', or make install in the repository"
        )


@app.command(
    epilog="Examples:\n\n"
    "- `crossmedia explore --store data/features --images photos`\n\n"
    "- `crossmedia explore --store data/features --runs data/runs --samples data/samples --images photos "
    "--model data/models/ctr --port 8090`\n\n"
    "- `crossmedia explore --store s3://shop/features --host 0.0.0.0 --tls-cert tls.crt --tls-key tls.key "
    "--token-file tokens.txt`"
)
def serve(
    store: Store = None,
    runs: Runs = None,
    samples: Samples = None,
    images: Images = None,
    model: Model = None,
    nets: Nets = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8090,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain of the server, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM; by default in the file of --tls-cert.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with one token per line; visitors enter one of them first.")
    ] = None,
) -> None:
    """Show pages of a store, its images, runs, impressions and a published model, in a browser. Read-only."""
    check_installed()
    from explorer.places import Places
    from explorer.server import serve as listen_and_answer
    from serving.settings import AccessSettings

    places = Places(store=store, runs=runs, samples=samples, images=images, model=model, nets=nets)
    places.check()
    listen_and_answer(
        AccessSettings(host=host, port=port, tls_cert=tls_cert, tls_key=tls_key, token_file=token_file, drain_s=5),
        places,
    )


@app.command(epilog="Example: `crossmedia explore export pages --store data/features --runs data/runs --images photos`")
def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; open OUT/index.html.")],
    store: Store = None,
    runs: Runs = None,
    samples: Samples = None,
    images: Images = None,
    model: Model = None,
    nets: Nets = None,
    most_files: Annotated[
        int, typer.Option(min=10, help="Most pages and pictures; further links lead to a page that says so.")
    ] = 2000,
) -> None:
    """Write the same pages into a folder, following all links from the first page. Leaves out forms and live parts."""
    check_installed()
    if not isinstance(run_path(out), Path):
        raise typer.BadParameter(f"{out} is an address: give a folder of this machine", param_hint="OUT")
    from explorer.export import export as write
    from explorer.html.filters import size
    from explorer.places import Places

    places = Places(store=store, runs=runs, samples=samples, images=images, model=model, nets=nets)
    places.check()
    with progress_bar("pages and pictures") as bar:
        exported = write(places, out, most_files, bar, bar.doing)
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
