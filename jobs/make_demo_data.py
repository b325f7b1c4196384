"""Make demo data: pictures of clothes, and the raw logs of simulated shoppers."""

from typing import TYPE_CHECKING, Any

import typer

from featurestore.console import commandline, output
from pipeline.options import DemoOptions
from pipeline.problems import Problem

if TYPE_CHECKING:
    from pipeline.demo.make import DemoSummary

EXAMPLES = """Examples:
  crossmedia demo-data
  crossmedia demo-data --small --out /tmp/demo --seed 7
  crossmedia demo-data --images photos --labels photos.csv --out data/demo-photos
"""
app = commandline.CommandApp(report=True, rich_markup_mode="rich")


@app.command(epilog=EXAMPLES)
@commandline.takes(DemoOptions)
def main(options: DemoOptions) -> None:
    """Make demo data: pictures of clothes, and the raw logs of simulated shoppers.

    Colour and pattern are independent of the category, and tastes depend on looks: that part of the signal is only in
    the pixels. OUT/demo.json has the AUC of the true click probabilities.
    """
    from pipeline.demo.make import make_demo

    _check_options(options)
    with output.progress_bar("measuring" if options.images else "drawing", options.num_items) as bar:
        summary = make_demo(options, bar.advance, bar.doing)
    output.print_summary(summary_text(options, summary))


def _check_options(options: DemoOptions) -> None:
    """Raise BadParameter for options that do not go together."""
    if options.images and options.items:
        raise typer.BadParameter(Problem.ONLY_WITH_DRAWN.of(), param_hint="--items")
    if options.labels and not options.images:
        raise typer.BadParameter(Problem.ONLY_WITH_IMAGES.of(), param_hint="--labels")


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
    ceiling = ", ".join(f"{metric} {output.figure(value)}" for metric, value in content["ceiling"].items())
    lines.append(f"ceiling      {ceiling}: knows the true logit but for its noise")
    if content.get("num_unreadable"):
        lines.append(f"unreadable   {content['num_unreadable']:,} images left out, listed in demo.json")
    if content.get("num_unlabelled"):
        lines.append(f"unlabelled   {content['num_unlabelled']:,} images")
    lines.append(f"images       {summary.images}")
    if options.images:  # they stay where they are, so the extraction needs their folder
        lines.append(f"next         crossmedia extract --images {summary.images} --store {options.out / 'features'}")
    return "\n".join([*lines, f"logs         {options.out / 'logs'}"])


if __name__ == "__main__":
    commandline.run_app(app)
