"""The places of all commands, as options."""

from typing import Annotated

import typer

Store = Annotated[str | None, typer.Option(help="Feature store: a folder or s3:// address.")]
Runs = Annotated[str | None, typer.Option(help="Folder or address that holds runs.")]
Samples = Annotated[str | None, typer.Option(help="Samples; by default each run's own.")]
Images = Annotated[str | None, typer.Option(help="Pictures: the folder or address that the store was made of.")]
Model = Annotated[str | None, typer.Option(help="Published model, to score with over HTTP.")]
