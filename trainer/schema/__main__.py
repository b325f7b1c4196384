"""crossmedia schema: suggest a schema for data, and check a schema against samples."""

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import print_rows, print_summary
from featurestore.published.paths import run_path
from trainer.errors import DataError, DataNotFoundError, SchemaError, TrainerError
from trainer.problems import Problem

if TYPE_CHECKING:
    from featurestore.storage.storage import Storage

BATCH_SIZE = 8192
LABEL = "label"
SHOWN = 10
SHOWN_IMAGES = 20
LOOKED_AT = 1000  # rows that tell samples from logs
app = CommandApp(
    help="Suggest a schema for data, and check a schema against samples.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.command(
    epilog="Examples:\n\n"
    "    crossmedia schema inspect data/samples --out schema.yaml\n\n"
    "    crossmedia schema inspect data/mylogs --out mapping.yaml"
)
def inspect(
    data: Annotated[
        str,
        typer.Argument(help="Folder or address of sample groups, or of raw logs (CSV or Parquet); or one file."),
    ],
    out: Annotated[Path | None, typer.Option(help="File to write; must be new.", show_default="the terminal")] = None,
    label: Annotated[
        str | None, typer.Option(help="Column of labels.", show_default="label; in logs what looks like one")
    ] = None,
    group: Annotated[str, typer.Option(help="Column that groups samples for GAUC.")] = "user",
    rows: Annotated[int, typer.Option(min=1, help="Most rows to read.")] = 200_000,
) -> None:
    """Write a first schema of sample groups, or a first mapping of raw logs for crossmedia samples.

    With types, numbers of different values, and suggested kinds, sides and table sizes as comments.
    """
    data = data.rstrip("/") or data
    from trainer.schema.suggest import LEFT_OUT, TO_DO

    with tempfile.TemporaryDirectory() as room:
        text = _inspected(data, out, label, group, rows, Path(room))
    if out is None:
        sys.stdout.write(text)
    else:
        _write_new(out, text)
        for line in text.splitlines():
            if line.strip().startswith((LEFT_OUT, TO_DO)):
                print_summary(f"warning      {line.strip().removeprefix('# ')}")


def _inspected(data: str, out: Path | None, label: str | None, group: str, rows: int, room: Path) -> str:
    """Write a schema of samples, or a mapping of logs; rows of tables of Delta and so on are copied into `room`."""
    from featurestore.published.versions import open_published
    from trainer.schema import lakes
    from trainer.schema.profile import SUFFIXES, json_hint
    from trainer.schema.suggest import inspect_logs, inspect_samples, render_mapping, render_schema

    if Path(data).is_file() and not data.endswith(SUFFIXES):
        raise DataError(Problem.NOT_A_TABLE_FILE, data, json_hint([data]))
    is_file = data.endswith(SUFFIXES) and ("://" in data or Path(data).is_file())
    place = None if is_file else open_published(data)
    found = lakes.below(place) if place is not None else {}
    if place is not None and not found and are_samples(place, label or LABEL):
        schema, made = inspect_samples(place, label or LABEL, group, rows)
        return render_schema(schema, made, data)
    is_table = "" in found if found else place is None or is_one_table(place)
    above, _, below = data.rpartition("/")
    folder, name = (above or ("/" if data.startswith("/") else "."), below) if is_table else (data, None)
    storage = open_published(folder)
    if found:
        lakes.copy_beside(storage, {each or str(name): kind for each, kind in found.items()}, room, rows)
        storage = open_published(str(room))
    logs = inspect_logs(storage, rows, name, label, folder)
    return render_mapping(logs, data, folder, "mapping.yaml" if out is None else str(out))


@app.command(epilog="Example: `crossmedia schema check schema.yaml data/samples`")
def check(
    schema: Annotated[Path, typer.Argument(help="YAML file.")],
    data: Annotated[str, typer.Argument(help="Folder or address of sample groups with train/ and test/.")],
) -> None:
    """Read every sample as a run would, and say the first thing that does not fit the schema.

    For numbers that are scaled or cut into buckets, their statistics in the training samples are printed.
    """
    from trainer.comm import SoloComm
    from trainer.samples.index import open_index
    from trainer.samples.reader import SampleReader
    from trainer.samples.survey import FOUND, fill_in, measure
    from trainer.schema.fields import load_schema

    fields = load_schema(schema)
    for split in ("train", "test"):
        index = open_index(SoloComm(), data, split, fields)
        if split == "train":
            fields = fill_in(fields, measure(SoloComm(), index, fields))
            for field in fields.fields:
                if values := field.model_dump(mode="json", include=set(FOUND), exclude_none=True):
                    print_summary(f"{field.name}  {json.dumps(values)}")
        for _ in SampleReader(index, fields, batch_size=BATCH_SIZE).batches():
            pass
        print_summary(f"{split:<6} {index.num_samples:,} samples in {index.num_groups:,} groups fit the schema")


@app.command(
    epilog="Examples:\n\n"
    "    crossmedia schema missing data/samples data/features\n\n"
    "    crossmedia schema missing data/samples data/features --out missing.csv"
)
def missing(
    data: Annotated[str, typer.Argument(metavar="SAMPLES", help="Folder or address of sample groups.")],
    store: Annotated[str, typer.Argument(help="Folder or address of a feature store; its newest snapshot counts.")],
    schema: Annotated[
        str | None, typer.Option(help="Schema of the samples.", show_default="SAMPLES/schema.yaml, or the packaged one")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the store in the schema.", show_default="images, as schemas do")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write all of them to NAME.csv instead.")] = None,
) -> None:
    """List the images that samples name and a feature store lacks, those of most impressions first.

    With the impressions and behaviours in train/ and test/ that name each, and why it has no feature: its reason in the
    store's quarantine, or that it was not extracted.
    """
    from pyarrow import csv

    from featurestore.console.files import check_ending, replaced_file
    from trainer.samples.survey import list_missing
    from trainer.schema.fields import DEFAULT_STORE

    if out is not None:
        check_ending(out, "--out", ".csv")
    table = list_missing(data, store, schema, name or DEFAULT_STORE)
    if out is not None:
        with replaced_file(out) as part:
            csv.write_csv(table, part)
        print_summary(f"written      {out}: {len(table):,} images")
        return
    rows = [[str(value) or "–" for value in row.values()] for row in table.slice(0, SHOWN_IMAGES).to_pylist()]
    if rows:
        print_rows(table.column_names, rows, ("impressions", "behaviors"))
    more = f"; --out NAME.csv writes all of them, here are {SHOWN_IMAGES} lines" if len(table) > SHOWN_IMAGES else ""
    count = sum(bool(name) for name in table.column("image").to_pylist())
    found = f"1 image of {data} has" if count == 1 else f"{count:,} images of {data} have"
    print_summary(f"{found} no feature in {store}{more}")


@app.command(
    epilog="Examples:\n\n"
    "    crossmedia schema lookup data/runs/both -8127164312765119041\n\n"
    "    crossmedia schema lookup data/runs/both sku-17 '[\"shoes\",3]'",
    context_settings={"ignore_unknown_options": True},  # a negative ID is not an option
)
def lookup(
    run: Annotated[str, typer.Argument(help="Folder or address of a run, or of samples.")],
    values: Annotated[
        list[str] | None,
        typer.Argument(
            help="IDs, whose texts to print, or texts, whose IDs to print.", show_default=f"the first {SHOWN} texts"
        ),
    ] = None,
) -> None:
    """Print the text of an ID, and the ID that a text gets.

    The text of an ID of crossed columns is a JSON list of their values.
    """
    from featurestore.keys import id_of_text, key_of_uri
    from trainer.samples.survey import IdDictionary

    dictionary = IdDictionary.of_run(run_path(run))
    if dictionary is None:
        raise DataNotFoundError(Problem.NO_TEXTS, run)
    if not values:
        entries, total = dictionary.first(SHOWN)
        print_summary(f"{dictionary.path}: {total:,} texts and their ids; the first of them:")
        for number, text in entries:
            print_summary(f"{number}  {text}")
        return
    ids = [id_of_text(value) for value in values]
    texts = dictionary.texts([*ids, *(key_of_uri(value) for value in values)])
    for value, number in zip(values, ids, strict=True):
        # A text that is a whole number is an ID; as a uri it has a key of its own.
        found = {each: texts[each] for each in (number, key_of_uri(value)) if each in texts}
        for each, text in (found or {number: "not in it as a text"}).items():
            print_summary(f"{each}  {text}")


def is_one_table(storage: "Storage") -> bool:
    """Whether a folder has several files of one table, and none in folders of their own.

    They have the same columns, or some more or less of them where all have labels and times under the same names.
    """
    from trainer.schema.profile import data_files, look
    from trainer.schema.suggest import match_columns

    files = data_files(storage) if storage.is_local else []
    if len(files) < 2 or any("/" in file for file in files):
        return False
    first, last = ([*look(storage, [file], None, 1).columns] for file in (files[0], files[-1]))
    names = [
        [match_columns(each, "impressions").get(ours) for ours in ("label", "timestamp")] for each in (first, last)
    ]
    return first == last or (names[0] == names[1] and None not in names[0])


def are_samples(storage: "Storage", label: str) -> bool:
    """Whether a place has sample groups: their labels are lists; without that column, some lists of numbers tell.

    The first file is read, of samples one in train/ or test/: other files are next to these, as bad rows. Raises
    DataError where there is no file.
    """
    from trainer.schema.profile import data_files, json_hint, look
    from trainer.schema.suggest import sample_files

    files = sample_files(storage) or data_files(storage)
    if not files:
        is_there = not storage.is_local or Path(storage.url).exists()
        problem = Problem.NO_TABLE_FILES if is_there else Problem.TABLES_NOT_THERE
        raise DataNotFoundError(problem, storage.url, json_hint(entry.path for entry in storage.entries("")))
    columns = look(storage, files[:1], None, LOOKED_AT).columns
    if label in columns:
        return columns[label].depth > 0
    has_label = any(each.is_binary for each in columns.values())
    has_lists = any(each.depth and each.content in ("integer", "real") for each in columns.values())
    return has_lists and (files[0].startswith(("train/", "test/")) or not has_label)


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise SchemaError(Problem.OUT_EXISTS, path) from error
    except OSError as error:
        raise TrainerError(Problem.OUT_NOT_WRITTEN, path, error) from error
    print_summary(f"written      {path}")


if __name__ == "__main__":
    run_app(app, "python -m trainer.schema")
