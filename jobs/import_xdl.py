"""Import text samples in the format of XDL's example as sample groups."""

from typing import Any

from featurestore.console import commandline, output
from pipeline.options import XdlOptions, takes_on_cluster

EXAMPLES = """Examples:
  crossmedia import --from imgs --store data/features-xdl
  crossmedia import-xdl --from data.txt --samples data/samples-xdl --label-threshold 0.5
"""

app = commandline.CommandApp(report=True, rich_markup_mode="rich")


@app.command(epilog=EXAMPLES)
@takes_on_cluster(XdlOptions)
def main(options: XdlOptions) -> None:
    """Import text samples in the format of XDL's example as sample groups, with a schema and settings for the trainer.

    Neighbouring lines with equal group key and user part are one group. Bad lines are counted and kept, with number and
    reason, in SAMPLES/quarantine.parquet.
    """
    from pipeline.cluster.tasks import connect
    from pipeline.xdl import import_samples

    with connect() as client:
        summary = import_samples(options, client)
    output.print_summary(summary_text(summary))


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
