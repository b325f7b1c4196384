"""Import XDL's example formats, text samples and binary images, or draw random data like the example's."""

from typing import Annotated, Any

import typer

from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import print_summary, progress_bar
from pipeline.options import MAX_DIM, XDL_DIM, ImportOptions, XdlOptions, XdlRandomOptions, takes
from trainer.schema.profile import SETTINGS_FILE

EXAMPLES = """Examples:

\b
python jobs/import_xdl.py random --out data/xdl
python jobs/import_xdl.py images --from data/xdl/imgs --store data/features-xdl
python jobs/import_xdl.py samples --from data/xdl/data.txt --samples data/samples-xdl --label-threshold 0.5
"""
SPLITS = ("train", "test")

app = CommandApp(
    report=True,
    may_be_empty=("--images", "--sparse", "--dense"),
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog=EXAMPLES,
    help="Import XDL's example formats, text samples and binary images, or draw such data at random.",
)


@app.command()
@takes(XdlOptions)
def samples(options: XdlOptions) -> None:
    """Import text samples as sample groups, with a schema and settings for the trainer.

    Neighbouring lines with equal group key and user part are one group. Bad lines are counted and kept, with number and
    reason, in SAMPLES/quarantine.parquet.
    """
    from pipeline.cluster.tasks import connect
    from pipeline.xdl import import_samples

    with connect() as client:
        summary = import_samples(options, client)
    print_summary(summary_text(summary))


@app.command()
def images(
    address: Annotated[str, typer.Option("--from", help="Folder of data.0 to data.1023.")],
    store: Annotated[str, typer.Option(help="Folder or address of the feature store; made when it is new.")],
    dim: Annotated[
        int | None, typer.Option(min=1, max=MAX_DIM, help="Numbers of an image.", show_default=f"{XDL_DIM}")
    ] = None,
    origin: Annotated[str | None, typer.Option("--source", help="What made them, in words.")] = None,
) -> None:
    """Import binary images into a feature store; jobs/import_features.py does the same with more options."""
    from pipeline.cluster.tasks import connect
    from pipeline.vectors import formats
    from pipeline.vectors.import_vectors import import_vectors

    with connect() as client:
        summary = import_vectors(
            formats.plan_xdl(address, dim), ImportOptions(address=address, store=store, origin=origin), client
        )
    print_summary(str(summary))


@app.command()
@takes(XdlRandomOptions)
def random(options: XdlRandomOptions) -> None:
    """Draw random data as the example's randtxt and randimg do, in their sizes (64 MB)."""
    from pipeline.xdl import IMAGE_FOLDER, TEXT_FILE, draw

    if options.num_ids > options.num_images:
        raise typer.BadParameter(
            f"{options.num_ids} is more than --images {options.num_images}: keys would have no image",
            param_hint="--ids",
        )
    with progress_bar("drawing images", options.num_images) as bar:
        draw(options, bar.advance)
    print_summary(
        f"samples      {options.num_lines:,} lines: {options.out / TEXT_FILE}\n"
        f"images       {options.num_images:,} of {options.dim:,} numbers: {options.out / IMAGE_FOLDER}"
    )


def summary_text(summary: dict[str, Any]) -> str:
    """Write the lines that the job prints."""
    bad = summary["quarantined"]
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in bad.items())
    split_lines = [
        f"{name:<12} {summary[name]['samples']:,} samples in {summary[name]['groups']:,} groups, "
        f"{summary[name]['clicks']:,} clicks"
        for name in SPLITS
    ]
    fields = ", ".join(f"{each['column']} ({each['part']} {each['kind']})" for each in summary["fields"])
    where = summary["options"]["samples"]
    return "\n".join(
        [
            f"lines        {summary['lines']:,}",
            f"quarantined  {sum(bad.values()):,}" + (f" ({reasons})" if reasons else ""),
            *split_lines,
            f"fields       {fields}",
            f"samples      {where}",
            f"next         python -m trainer.main --config {where.rstrip('/')}/{SETTINGS_FILE} --set data.store=STORE",
        ]
    )


if __name__ == "__main__":
    run_app(app)
