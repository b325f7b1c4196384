"""Make sample groups, the trainer's input, from impression and behaviour logs."""

from typing import Any

from featurestore.console import commandline, output
from featurestore.text import count_text
from pipeline.options import SampleOptions, takes_on_cluster

EXAMPLES = """Examples:
  crossmedia samples --logs logs --samples samples
  crossmedia samples --window-days 7 --min-dwell-s 10 --max-behaviors 100 --test-days 2
  crossmedia samples --logs mylogs --mapping mapping.yaml --samples samples
  crossmedia samples --samples samples --days 2026-03-20
  crossmedia samples --samples samples --since 2026-03-01
  crossmedia samples --logs s3://shop/logs --samples /shared/samples -n 8 --threads-per-worker 1
"""

app = commandline.CommandApp(report=True, rich_markup_mode="rich")


@app.command(epilog=EXAMPLES)
@takes_on_cluster(SampleOptions)
def main(options: SampleOptions) -> None:
    """Make sample groups, the trainer's input, from impression and behaviour logs.

    Rows with forbidden nulls, with labels other than 0 and 1, or from the future are counted and
    kept in SAMPLES/quarantine.parquet; counts of everything are in SAMPLES/summary.json. With --mapping a schema and
    settings for the trainer are written to SAMPLES too. --days and --since add days to existing samples.
    """
    from pipeline.cluster.tasks import connect
    from pipeline.samples.added import add_days
    from pipeline.samples.build import build_samples

    if options.days is None and options.since is None:
        with connect() as client:
            summary = build_samples(options, client)
        output.print_summary(summary_text(summary))
        return
    with connect() as client:
        made = add_days(options, client)
    output.print_summary(f"days         {', '.join(made['days']) or 'none is missing'}")
    output.print_summary(f"groups       {made['groups']:,}, with {made['impressions']:,} impressions")
    output.print_summary(f"samples      {made['samples']}")


def summary_text(summary: dict[str, Any]) -> str:
    """Write the summary that the job prints."""
    shown, done = summary["impressions"], summary["behaviors"]
    lines = [
        f"impressions  {shown['kept']:,} of {shown['rows']:,} kept, {shown['without_image']:,} without an image; "
        f"{shown['duplicates']:,} duplicates, {_bad(shown)}{_further(shown)}",
        f"behaviours   {done['used']:,} of {done['rows']:,} used; {done['unused']:,} in no window, "
        f"{done['short_dwell']:,} too short, {done['duplicates']:,} duplicates, {_bad(done)}{_further(done)}",
        f"groups       {summary['groups']:,} of {summary['users']:,} users, with "
        f"{summary['behaviors_in_groups'] / summary['groups']:.1f} behaviours each; "
        f"{summary['groups_without_behaviors']:,} without",
        *(_split(name, summary[name]) for name in ("train", "test")),
        f"samples      {summary['options']['samples']}",
    ]
    if not summary["train"]["positive_rate"]:
        lines.append("warning      no impression to train on has a click: look at label, or clicked, of the mapping")
    return "\n".join(lines)


def _bad(log: dict[str, Any]) -> str:
    from pipeline.samples.build import bad_reasons

    reasons = bad_reasons(log["quarantined"], log["examples"])
    return f"{sum(log['quarantined'].values()):,} quarantined" + (f" ({reasons})" if reasons else "")


def _further(log: dict[str, Any]) -> str:
    """Report the gaps of joined tables and tables of events, where there are any."""
    texts = []
    if clicks := log.get("clicks"):
        texts.append(f"{clicks:,} clicks, {log['clicks_without_impression']:,} of them without an impression before")
    lacking = {by: count_text(count, "row") for by, count in log["lacking"].items() if count}
    texts += [f"{rows} whose {by} is not in its table" for by, rows in lacking.items()]
    if others := log["other_events"]:
        texts.append(f"other events: {', '.join(f'{count:,} {name}' for name, count in others.items())}")
    return "".join(f"; {text}" for text in texts)


def _split(name: str, split: dict[str, Any]) -> str:
    if not split["files"]:
        return f"{name:<12} nothing"
    return (
        f"{name:<12} {split['first_day']} to {split['last_day']}, {split['groups']:,} groups, "
        f"{split['impressions']:,} impressions, {split['positive_rate']:.2%} clicks"
    )


if __name__ == "__main__":
    commandline.run_app(app)
