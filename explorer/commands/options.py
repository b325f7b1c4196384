"""The places of all commands, as options."""

from pathlib import Path
from typing import Annotated

import typer

Store = Annotated[str | None, typer.Option(help="Feature store: a folder or s3:// address.")]
Runs = Annotated[str | None, typer.Option(help="Folder or address that holds runs.")]
Samples = Annotated[str | None, typer.Option(help="Samples; by default each run's own.")]
Images = Annotated[str | None, typer.Option(help="Pictures: the folder or address that the store was made of.")]
Model = Annotated[str | None, typer.Option(help="Published model, to score with over HTTP.")]
Nets = Annotated[
    str | None,
    typer.Option(
        metavar="PACKAGE",
        help="Package whose classes runs may name as model.base. A page that asks such a run imports it.",
        show_default="none is imported",
    ),
]
Scorer = Annotated[
    str | None,
    typer.Option(help="Running scorer of --model, http://HOST:PORT.", show_default="one is started on this machine"),
]
ScorerTokenFile = Annotated[Path | None, typer.Option(help="File whose first line is the token for --scorer.")]
ScorerCa = Annotated[
    Path | None, typer.Option(help="Certificates to trust for --scorer, PEM.", show_default="those of the system")
]
