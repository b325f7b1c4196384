"""Import XDL's example formats, text samples and binary images, or draw random data like the example's."""

from pathlib import Path
from typing import Annotated, Any

import typer

from featurestore.console.commandline import CommandApp, on_this_machine, run_app
from featurestore.console.output import print_summary, progress_bar
from pipeline.options import MAX_DIM, XDL_DIM, ImportOptions, XdlOptions, takes
from pipeline.xdl.draw import IMAGE_FOLDER, TEXT_FILE, DrawOptions, draw
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
    from pipeline.xdl.samples import import_samples

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
def random(
    out: Annotated[Path, typer.Option(help="Folder to write: data.txt and imgs/.", callback=on_this_machine)],
    lines: Annotated[int, typer.Option(min=1, help="Text samples.")] = DrawOptions.num_lines,
    image_count: Annotated[int, typer.Option("--images", min=1, help="Images.")] = DrawOptions.num_images,
    dim: Annotated[int, typer.Option(min=1, max=MAX_DIM, help="Numbers of an image.")] = DrawOptions.dim,
    ids: Annotated[int, typer.Option(min=1, help="Ids are 1 to this, those of images too.")] = DrawOptions.num_ids,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal bytes.")] = 0,
) -> None:
    """Draw random data as the example's randtxt and randimg do, in their sizes (64 MB)."""
    if ids > image_count:
        raise typer.BadParameter(
            f"{ids} is more than --images {image_count}: keys would have no image", param_hint="--ids"
        )
    sizes = DrawOptions(num_lines=lines, num_images=image_count, dim=dim, num_ids=ids, seed=seed)
    with progress_bar("drawing images", image_count) as bar:
        draw(sizes, out, bar.advance)
    print_summary(
        f"samples      {lines:,} lines: {out / TEXT_FILE}\n"
        f"images       {image_count:,} of {dim:,} numbers: {out / IMAGE_FOLDER}"
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
