"""Export the ids of an exact ID table of a run, and their vectors."""

import time
from pathlib import Path
from typing import Annotated

import typer

from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.progress import progress_bar
from trainer.cli import WhichCheckpoint, check_ending

EXAMPLES = """Examples:

\b
python jobs/export_ids.py
python jobs/export_ids.py --run data/runs/exact --table item --out items.parquet

Exit codes: 0 done, 1 failed, 2 wrong options.
"""

app = CommandApp(rich_markup_mode="rich")


@app.command(epilog=EXAMPLES)
def main(
    run: Annotated[
        Path | None, typer.Option(help="Folder of a run with an exact table.", show_default="the newest in data/runs")
    ] = None,
    table: Annotated[str | None, typer.Option(help="Which table; needed where a run has several exact ones.")] = None,
    checkpoint: WhichCheckpoint = None,
    out: Annotated[str, typer.Option(help="File to write, or replace: NAME.parquet.")] = "data/ids.parquet",
) -> None:
    """Export the ids of an exact ID table of a run, and their vectors.

    The file has the columns id, shard, last_use (a day) and vector (a list of float32). A row without an id is the cold
    row of its shard, which stands in for all ids of the shard that are not in the file.
    """
    from trainer.runs.export import export_table, open_table
    from trainer.runs.folder import newest_run

    check_ending(out, ".parquet")
    start = time.monotonic()
    opened = open_table(run or newest_run(), table, checkpoint)
    with progress_bar("shards") as progress:
        count = export_table(opened, out, progress)
    about = opened.describe()
    typer.echo(f"run          {about['run']}, {about['checkpoint']}, table {about['table']}")
    typer.echo(f"ids          {count:,}, in {about['num_shards']} shards with a cold row each")
    typer.echo(f"time         {time.monotonic() - start:.1f} s")
    typer.echo(f"written to   {out}")


if __name__ == "__main__":
    run_app(app)
