"""Make semantic IDs: codes of a residual quantiser for every image, as ID fields of the samples."""

from pathlib import Path
from typing import Annotated, Any

import typer

from featurestore.console.commandline import CommandApp, run_app
from trainer.schema.text import SETTINGS_FILE

EXAMPLES = """Examples:

\b
python jobs/build_semantic_ids.py
python jobs/build_semantic_ids.py --store data/features --samples data/samples --out data/samples-sid
python jobs/build_semantic_ids.py --vectors data/visual.parquet --levels 2
python jobs/build_semantic_ids.py --codebook data/sid/codebook.safetensors --out data/sid-tuesday --no-samples
"""

STORE, SAMPLES = "data/features", "data/samples"

app = CommandApp(rich_markup_mode="rich")


@app.command(epilog=EXAMPLES)
def main(
    out: Annotated[
        Path, typer.Option(help="Folder to write: codebook, codes, samples, schema, settings; replaced.")
    ] = Path("data/samples-sid"),
    store: Annotated[str | None, typer.Option(help="Feature store whose images get codes.", show_default=STORE)] = None,
    vectors: Annotated[
        str | None, typer.Option(help="In place of --store: what export_embeddings.py made, or any with keys.")
    ] = None,
    keys: Annotated[str | None, typer.Option(help="Keys of a .npy: .npy of int64, or a text file of ids.")] = None,
    samples: Annotated[
        str | None,
        typer.Option(help="Sample groups that get the codes as columns.", show_default=f"{SAMPLES} where it is there"),
    ] = None,
    no_samples: Annotated[bool, typer.Option("--no-samples", help="Codes alone.")] = False,
    schema: Annotated[
        Path | None, typer.Option(help="Of the samples.", show_default="SAMPLES/schema.yaml, else the packaged one")
    ] = None,
    store_name: Annotated[str, typer.Option(help="The store's name in the schema.")] = "images",
    levels: Annotated[int, typer.Option(min=1, max=8, help="Codes of an image.")] = 3,
    codes: Annotated[int, typer.Option(min=2, max=65536, help="Different codes of a level, a power of two.")] = 256,
    sample_rows: Annotated[int, typer.Option(min=2, help="Vectors to fit on, drawn at random.")] = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw and of k-means.")] = 0,
    standardize: Annotated[
        bool, typer.Option("--standardize/--raw", help="Each dimension to mean 0 and deviation 1 first.")
    ] = True,
    codebook: Annotated[
        Path | None, typer.Option(help="Of an earlier run, so that codes keep their meaning; nothing is fitted.")
    ] = None,
    accept_store: Annotated[
        bool,
        typer.Option("--accept-store", help="Take --codebook also where it is of another store of the same network."),
    ] = False,
) -> None:
    """Make semantic IDs: codes of a residual quantiser for every image, as ID fields of the samples.

    An image column gets the code of each level (_sid0, _sid1 …) and the first two, three … codes as one id
    (_sid_prefix2 …). An image without a vector gets -1. OUT/summary.json has usage, entropy, collisions, error.
    """
    from pipeline.semantic.build import SemanticOptions, build_semantic_ids

    if store and vectors:
        raise typer.BadParameter("give one of --store and --vectors", param_hint="--store")
    if samples and no_samples:
        raise typer.BadParameter("give one of --samples and --no-samples", param_hint="--samples")
    if not samples and not no_samples and Path(SAMPLES).is_dir():
        samples = SAMPLES
    options = SemanticOptions(
        out=out,
        store=store or STORE,
        vectors=vectors,
        keys=keys,
        samples=samples,
        schema=schema,
        store_name=store_name,
        num_levels=levels,
        num_codes=codes,
        sample_rows=sample_rows,
        seed=seed,
        standardize=standardize,
        codebook=codebook,
        accept_store=accept_store,
    )
    summary = build_semantic_ids(options)
    typer.echo(describe(summary, out))


def describe(summary: dict[str, Any], out: Path) -> str:
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
        lines.append(f"next         python -m trainer.main --config {out / SETTINGS_FILE}")
    return "\n".join([*lines, f"folder       {out}"])


if __name__ == "__main__":
    run_app(app)
