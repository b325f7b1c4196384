"""Import text samples of XDL's example, or draw random data like the example's, text samples and binary images."""

from typing import Any

from featurestore.console import commandline, output
from pipeline.options import XdlOptions, XdlRandomOptions, takes_on_cluster

EXAMPLES = """Examples:

\b
crossmedia import-xdl random --out data/xdl
crossmedia import --from data/xdl/imgs --store data/features-xdl
crossmedia import-xdl samples --from data/xdl/data.txt --samples data/samples-xdl --label-threshold 0.5
"""

app = commandline.CommandApp(
    report=True,
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog=EXAMPLES,
    help="Import text samples of XDL's example, or draw such data at random; import_features reads its binary images.",
)


@app.command()
@takes_on_cluster(XdlOptions)
def samples(options: XdlOptions) -> None:
    """Import text samples as sample groups, with a schema and settings for the trainer.

    Neighbouring lines with equal group key and user part are one group. Bad lines are counted and kept, with number and
    reason, in SAMPLES/quarantine.parquet.
    """
    from pipeline.cluster.tasks import connect
    from pipeline.xdl import import_samples

    with connect() as client:
        summary = import_samples(options, client)
    output.print_summary(summary_text(summary))


@app.command()
@commandline.takes(XdlRandomOptions)
def random(options: XdlRandomOptions) -> None:
    """Draw random data as the example's randtxt and randimg do, in their sizes (64 MB)."""
    from pipeline.xdl import IMAGE_FOLDER, TEXT_FILE, draw

    with output.progress_bar("drawing images", options.num_images) as bar:
        draw(options, bar.advance)
    output.print_summary(
        f"samples      {options.num_lines:,} lines: {options.out / TEXT_FILE}\n"
        f"images       {options.num_images:,} of {options.dim:,} numbers: {options.out / IMAGE_FOLDER}"
    )


def summary_text(summary: dict[str, Any]) -> str:
    """Write the lines that the job prints."""
    from trainer.schema.fields import SETTINGS_FILE

    bad = summary["quarantined"]
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in bad.items())
    where = summary["options"]["samples"]
    lines = [
        f"lines        {summary['lines']:,}",
        f"quarantined  {sum(bad.values()):,}" + (f" ({reasons})" if reasons else ""),
    ]
    for name in ("train", "test"):
        counts = summary[name]
        in_groups = f"{counts['samples']:,} samples in {counts['groups']:,} groups, {counts['clicks']:,} clicks"
        lines.append(f"{name:<12} {in_groups}")
    lines.append(f"samples      {where}")
    lines.append(f"next         crossmedia train --config {where.rstrip('/')}/{SETTINGS_FILE} --set data.store=STORE")
    return "\n".join(lines)


if __name__ == "__main__":
    commandline.run_app(app)
