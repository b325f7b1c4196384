"""Make demo data: pictures of clothes, and the raw logs of simulated people who look at them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurestore.console.commandline import CommandApp, on_this_machine, run_app
from featurestore.console.output import figure, print_summary, progress_bar
from pipeline.demo.world import DemoOptions

if TYPE_CHECKING:
    from pipeline.demo.make import DemoSummary

EXAMPLES = """Examples:

\b
python jobs/make_demo_data.py
python jobs/make_demo_data.py --small --out /tmp/demo --seed 7
python jobs/make_demo_data.py --images photos --labels photos.csv --out data/demo-photos
"""
DEFAULT = DemoOptions(out=Path("data"))
SMALL = {"items": 200, "users": 1500}

app = CommandApp(report=True, rich_markup_mode="rich")


@app.command(epilog=EXAMPLES)
def main(
    out: Annotated[
        Path, typer.Option(help="Folder to write: images, logs and demo.json.", callback=on_this_machine)
    ] = DEFAULT.out,
    items: Annotated[int | None, typer.Option(min=20, help="Clothes to draw.", show_default=str(DEFAULT.items))] = None,
    users: Annotated[
        int | None, typer.Option(min=10, help="People to simulate.", show_default=str(DEFAULT.users))
    ] = None,
    days: Annotated[int, typer.Option(min=2, max=366, help="Days of the log; the last is the test day.")] = 19,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal bytes.")] = 0,
    small: Annotated[
        bool, typer.Option("--small", help=f"{SMALL['items']} clothes and {SMALL['users']} people: quick, and noisy.")
    ] = False,
    images: Annotated[
        Path | None, typer.Option(help="Folder of your own photographs, in place of drawn clothes; nothing is copied.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="CSV with the columns image and label: the photographs' categories.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a demo made with other options.")] = False,
) -> None:
    """Make demo data: pictures of clothes, and the raw logs of simulated people who look at them.

    Colour and pattern are independent of the category, and taste is for looks: that part of the signal is in the
    pixels alone. OUT/demo.json says how much, and which AUC the truth itself would reach.
    """
    from pipeline.demo.make import make_demo

    _check_options(images, labels, items)
    options = DemoOptions(
        out=out,
        items=items or (SMALL["items"] if small else DEFAULT.items),
        users=users or (SMALL["users"] if small else DEFAULT.users),
        days=days,
        seed=seed,
        images=images,
        labels=labels,
        force=force,
    )
    with progress_bar("measuring" if images else "drawing", options.items) as bar:
        summary = make_demo(options, bar.advance)
    print_summary(summary_text(options, summary))


def _check_options(images: Path | None, labels: Path | None, items: int | None) -> None:
    """Raise BadParameter for options that do not go together."""
    if images and items:
        raise typer.BadParameter(
            "goes with drawn clothes; with --images every readable image is an item", param_hint="--items"
        )
    if labels and not images:
        raise typer.BadParameter("goes with --images", param_hint="--labels")


def summary_text(options: DemoOptions, summary: "DemoSummary") -> str:
    """Write the summary that the job prints."""
    content = summary.content
    counts: dict[str, Any] = content["counts"]
    lines = [f"{options.out} has this demo already, nothing to do"] if summary.already_there else []
    lines += [
        f"items        {counts['items']:,} in {counts['categories']} categories, "
        f"{counts['new_items']:,} new on the last day",
        f"users        {counts['users']:,} with {counts['behaviors']:,} organic clicks",
        f"train        {counts['train_impressions']:,} impressions from {content['first_day']}",
        f"test         {counts['test_impressions']:,} impressions on {content['test_day']}, "
        f"{content['new_ad_share_of_test']:.1%} of new ads",
        f"clicked      {content['click_rate']:.1%} of the impressions",
    ]
    ceiling = ", ".join(f"{metric} {figure(value)}" for metric, value in content["ceiling"].items())
    lines.append(f"ceiling      {ceiling}: knows the true logit but for its noise")
    if content.get("num_unreadable"):
        lines.append(f"unreadable   {content['num_unreadable']:,} images left out, listed in demo.json")
    if content.get("num_unlabelled"):
        lines.append(f"unlabelled   {content['num_unlabelled']:,} images")
    lines.append(f"images       {summary.images}" + (_pointer(options, summary) if options.images else ""))
    lines.append(f"logs         {options.out / 'logs'}")
    return "\n".join(lines)


def _pointer(options: DemoOptions, summary: "DemoSummary") -> str:
    """Write the next command: the images stay where they are, so the extraction needs their folder."""
    return f"\nnext         jobs/extract_features.py --images {summary.images} --store {options.out / 'features'}"


if __name__ == "__main__":
    run_app(app)
