"""Make semantic IDs: codes of a residual quantiser for every image, as ID fields of the samples."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from featurestore.console.commandline import CommandApp, run_app
from featurestore.store import FeatureStore
from featurestore.text.parsing import parse_yaml
from pipeline.semantic.build import SemanticOptions, build_semantic_ids
from pipeline.semantic.samples import code_columns, sample_files
from pipeline.semantic.vectors import StoreVectors, Vectors, open_file
from trainer.errors import SchemaError
from trainer.schema import Field, Schema, load_schema
from trainer.schema.text import SCHEMA_FILE, SETTINGS_FILE, schema_text, settings_text, table_rows

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
    if store and vectors:
        raise typer.BadParameter("give one of --store and --vectors", param_hint="--store")
    if samples and no_samples:
        raise typer.BadParameter("give one of --samples and --no-samples", param_hint="--samples")
    if not samples and not no_samples and Path(SAMPLES).is_dir():
        samples = SAMPLES
    options = SemanticOptions(out, samples, levels, codes, sample_rows, seed, standardize, codebook, accept_store)
    if samples:
        sample_files(samples)  # before the store is read through
    found = load_schema(schema or _schema_beside(samples)) if samples else None
    columns = _image_columns(found, store_name) if found else []
    describe_files = partial(describe_samples, found, store_name, options) if found else _nothing
    summary = build_semantic_ids(_open(store, vectors, keys), options, columns, describe_files)
    typer.echo(describe(summary, out))


def describe_samples(
    schema: Schema, store_name: str, options: SemanticOptions, summary: dict[str, Any]
) -> Mapping[str, str]:
    """The schema with the codes as ID fields, and settings with their tables."""
    fields, tables = list(schema.fields), _tables_beside(options.samples)
    levels = summary["levels"]
    seen = set()
    for field in schema.of_kind("content"):
        if field.store_name != store_name or field.column_name in seen:
            continue
        seen.add(field.column_name)
        for name, (what, number) in code_columns(field.column_name, len(levels)).items():
            table = f"{store_name}_sid{number}" if what == "level" else f"{store_name}_sid_prefix{number}"
            used = levels[number]["used"] if what == "level" else levels[number - 1]["distinct_prefixes"]
            tables[table] = table_rows(used + 1)
            kind: Any = "id" if field.side == "ad" else "multi_id"
            fields.append(Field(name=name, side=field.side, kind=kind, table=table))
    header = [
        "Fields of the samples, and the codes of their images: _sid0 is the first code, _sid_prefix2 the first two.",
        f"Codebook {summary['codebook']['sha256'][:16]}; -1 stands for an image without a code.",
    ]
    made = schema.model_copy(update={"fields": tuple(fields)})
    where = str(options.out / SCHEMA_FILE)
    return {
        SCHEMA_FILE: schema_text(made, header),
        SETTINGS_FILE: settings_text(str(options.out), where, tables, summary["source"].get("store")),
    }


def describe(summary: dict[str, Any], out: Path) -> str:
    """The lines that the job prints."""
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


def _open(store: str | None, vectors: str | None, keys: str | None) -> Vectors:
    if vectors is not None:
        return open_file(vectors, keys)
    return StoreVectors(FeatureStore.open(store or STORE).snapshot())


def _image_columns(schema: Schema, store_name: str) -> list[str]:
    """Columns of the content fields of one store. Raises SchemaError where there are none."""
    fields = list(schema.of_kind("content"))
    columns = list(dict.fromkeys(field.column_name for field in fields if field.store_name == store_name))
    if not columns:
        known = ", ".join(sorted({field.store_name for field in fields})) or "none"
        raise SchemaError(f"the schema has no content field of store {store_name}; its stores: {known} (--store-name)")
    return columns


def _schema_beside(samples: str) -> Path | None:
    path = Path(samples) / SCHEMA_FILE
    return path if path.is_file() else None


def _tables_beside(samples: str | None) -> dict[str, int]:
    """Tables of the settings that stand beside the samples already."""
    path = Path(samples or "") / SETTINGS_FILE
    if not path.is_file():
        return {}
    try:
        return dict(parse_yaml(path.read_text(encoding="utf-8"))["model"]["tables"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise SchemaError(f"{path} has no model.tables: {error}") from error


def _nothing(summary: dict[str, Any]) -> Mapping[str, str]:
    return {}


if __name__ == "__main__":
    run_app(app)
