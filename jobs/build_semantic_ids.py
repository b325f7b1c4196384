"""Make semantic IDs: codes of a residual quantiser for every image, as ID fields of the samples."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from featurestore.console.commandline import CommandApp, run_app, takes
from featurestore.console.output import print_summary
from pipeline.options import DEFAULT_SAMPLES, SemanticOptions
from trainer.schema.fields import SETTINGS_FILE

EXAMPLES = """Examples:

\b
python jobs/build_semantic_ids.py
python jobs/build_semantic_ids.py --store data/features --samples data/samples --out data/samples-sid
python jobs/build_semantic_ids.py --vectors data/visual.parquet --levels 2
python jobs/build_semantic_ids.py --codebook data/sid/codebook.safetensors --out data/sid-tuesday --no-samples
python jobs/build_semantic_ids.py --codebook data/samples-sid/codebook.safetensors --out data/samples-sid
"""


app = CommandApp(report=True, rich_markup_mode="rich")


@app.command(epilog=EXAMPLES)
@takes(SemanticOptions)
def main(options: SemanticOptions) -> None:
    """Make semantic IDs: codes of a residual quantiser for every image, as ID fields of the samples.

    An image column gets the code of each level (_sid0, _sid1 …) and the first two, three … codes as one id
    (_sid_prefix2 …). An image without a vector gets -1. OUT/summary.json has usage, entropy, collisions, error.
    """
    from pipeline.semantic.samples import build_semantic_ids

    if options.store and options.vectors:
        raise typer.BadParameter("give one of --store and --vectors", param_hint="--store")
    if options.samples and options.no_samples:
        raise typer.BadParameter("give one of --samples and --no-samples", param_hint="--samples")
    if not options.samples and not options.no_samples and Path(DEFAULT_SAMPLES).is_dir():
        options = replace(options, samples=DEFAULT_SAMPLES)
    summary = build_semantic_ids(options)
    print_summary(summary_text(summary, options.out))


def summary_text(summary: dict[str, Any], out: str) -> str:
    """Write the lines that the job prints."""
    book = summary["codebook"]
    lines = [
        f"images       {summary['images']:,}",
        f"codebook     {book['levels']} levels of {book['codes']} codes, {'new' if book['fitted'] else 'as it was'}, "
        f"sha256 {book['sha256'][:16]}",
    ]
    for number, level in enumerate(summary["levels"]):
        lines.append(
            f"level {number}      {level['used']:,} of {level['of']:,} codes used, {level['entropy_bits']:.2f} bits, "
            f"largest {level['largest_share']:.1%}, {level['distinct_prefixes']:,} prefixes, "
            f"error {level['reconstruction_error']:.3f}"
        )
    lines.append(
        f"collisions   {summary['images_that_share_their_code']:,} images ({summary['collision_share']:.1%}) share "
        f"their whole code; {summary['images_per_code']:.2f} images a code, "
        f"{summary['most_images_of_a_code']:,} at most"
    )
    if made := summary.get("samples"):
        lines.append(
            f"samples      {made['groups']:,} groups, {made['references']:,} images in them, "
            f"{made['references_without_code']:,} without a code (of {made['images_without_code']:,} images)"
        )
        lines.append(f"next         python -m trainer.main --config {out.rstrip('/')}/{SETTINGS_FILE}")
    return "\n".join([*lines, f"folder       {out}"])


if __name__ == "__main__":
    run_app(app)
