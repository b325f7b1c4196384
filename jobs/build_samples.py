"""Make sample groups, the trainer's input, from impression and behaviour logs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from featurestore.console.commandline import CommandApp, run_app

EXAMPLES = """Examples:

\b
python jobs/build_samples.py --logs logs --samples samples
python jobs/build_samples.py --window-days 7 --min-dwell-s 10 --max-behaviors 100 --test-days 2
python jobs/build_samples.py --logs mylogs --mapping mapping.yaml --samples samples
dask-submit -n 8 --threads-per-worker 1 jobs/build_samples.py --logs s3://shop/logs --samples /shared/samples
"""
LONGEST_DAYS = 36_500
MOST_BEHAVIORS = 1_000_000

app = CommandApp(rich_markup_mode="rich", may_be_empty=("--user-columns",))


@app.command(epilog=EXAMPLES)
def main(
    logs: Annotated[
        str, typer.Option(help="Folder or address with impressions/*.parquet and behaviors/*.parquet.")
    ] = "data/logs",
    samples: Annotated[
        str, typer.Option(help="Folder to write, on a disk that all workers see; samples in it are replaced.")
    ] = "data/samples",
    window_days: Annotated[
        float, typer.Option(min=0, max=LONGEST_DAYS, help="How far before an impression behaviours count.")
    ] = 14,
    min_dwell_s: Annotated[
        float, typer.Option(min=0, max=LONGEST_DAYS * 86_400, help="Seconds that a behaviour has to last.")
    ] = 5,
    max_behaviors: Annotated[int, typer.Option(min=1, max=MOST_BEHAVIORS, help="The newest of a group.")] = 50,
    test_days: Annotated[int, typer.Option(min=0, max=LONGEST_DAYS, help="Last days, for testing.")] = 1,
    user_columns: Annotated[
        str | None,
        typer.Option(help="Columns of users to keep, with commas.", show_default="user_age and user_gender if there"),
    ] = None,
    behavior_age: Annotated[
        bool,
        typer.Option(
            "--behavior-age",
            help="Add the column behavior_age: seconds from each behaviour to the first impression of its group.",
        ),
    ] = False,
    mapping: Annotated[
        Path | None,
        typer.Option(
            help="YAML file that says how your own tables are called, CSV or Parquet; python -m trainer.schema inspect "
            "LOGS writes a first one."
        ),
    ] = None,
    partitions: Annotated[
        int | None, typer.Option(min=1, help="Buckets of users, one task each; the samples do not change with it.")
    ] = None,
) -> None:
    """Make sample groups, the trainer's input, from impression and behaviour logs.

    Rows that are null where they must not be, have labels other than 0 and 1, or are in the future are counted and
    kept in SAMPLES/quarantine.parquet; counts of everything are in SAMPLES/summary.json. With --mapping a schema and
    settings for the trainer are written to SAMPLES too.
    """
    from pipeline.cluster.connect import connect
    from pipeline.samples.build import SampleOptions, build_samples
    from pipeline.samples.mapping import names_in

    options = SampleOptions(
        logs=logs,
        samples=samples,
        window_days=window_days,
        min_dwell_s=min_dwell_s,
        max_behaviors=max_behaviors,
        test_days=test_days,
        user_columns=None if user_columns is None else names_in(user_columns),
        partitions=partitions,
        mapping=None if mapping is None else str(mapping),
        behavior_age=behavior_age,
    )
    with connect() as client:
        summary = build_samples(options, client)
    typer.echo(describe(summary))


def describe(summary: dict[str, Any]) -> str:
    """Write the summary that the job prints."""
    shown, done = summary["impressions"], summary["behaviors"]
    new = summary["new_ads"]
    lines = [
        f"impressions  {shown['kept']:,} of {shown['rows']:,} kept; {shown['duplicates']:,} duplicates, {_bad(shown)}",
        f"behaviours   {done['used']:,} of {done['rows']:,} used; {done['unused']:,} in no window, "
        f"{done['short_dwell']:,} too short, {done['duplicates']:,} duplicates, {_bad(done)}",
        f"groups       {summary['groups']:,} of {summary['users']:,} users, with "
        f"{summary['behaviors_in_groups'] / summary['groups']:.1f} behaviours each; "
        f"{summary['groups_without_behaviors']:,} without",
        *(_split(name, summary[name]) for name in ("train", "test")),
        f"new ads      {new['ads']:,} in test that are not in train",
        f"samples      {summary['options']['samples']}",
    ]
    return "\n".join(lines)


def _bad(log: dict[str, Any]) -> str:
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in log["quarantined"].items())
    return f"{sum(log['quarantined'].values()):,} quarantined" + (f" ({reasons})" if reasons else "")


def _split(name: str, split: dict[str, Any]) -> str:
    if not split["files"]:
        return f"{name:<12} nothing"
    return (
        f"{name:<12} {split['first_day']} to {split['last_day']}, {split['groups']:,} groups, "
        f"{split['impressions']:,} impressions, {split['positive_rate']:.2%} clicks"
    )


if __name__ == "__main__":
    run_app(app)
