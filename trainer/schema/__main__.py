"""python -m trainer.schema: look at data and write a first schema of it, and check a schema against samples."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import print_summary
from featurestore.keys import id_of_text, key_of_uri
from featurestore.published.paths import RunPath, run_path
from trainer.errors import DataNotFoundError, SchemaError, TrainerError
from trainer.schema.fields import load_schema

if TYPE_CHECKING:
    from featurestore.storage.storage import Storage

BATCH_SIZE = 8192
SHOWN = 10
EXAMPLES = """
Examples:

    python -m trainer.schema inspect data/samples --out schema.yaml

    python -m trainer.schema inspect data/mylogs --out mapping.yaml

    python -m trainer.schema check schema.yaml data/samples

    python -m trainer.schema lookup data/runs/both 4521387690122 sku-17
"""

app = CommandApp(
    help="Look at data and write a first schema of it, and check a schema against samples.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    epilog=EXAMPLES,
)


@app.command(epilog="Example: `python -m trainer.schema inspect data/samples --out schema.yaml`")
def inspect(
    data: Annotated[
        str,
        typer.Argument(help="Folder or address of sample groups, or of raw logs (CSV or Parquet); or a run's folder."),
    ],
    out: Annotated[Path | None, typer.Option(help="File to write; must be new.", show_default="the terminal")] = None,
    label: Annotated[str, typer.Option(help="Column of labels, in sample groups.")] = "label",
    group: Annotated[str, typer.Option(help="Column that groups samples for GAUC.")] = "user",
    rows: Annotated[int, typer.Option(min=1, help="Rows to look at, at most.")] = 200_000,
) -> None:
    """Write a first schema of sample groups, or a first mapping of raw logs for jobs/build_samples.py.

    With types, numbers of different values, and suggested kinds, sides and table sizes as comments. Of a run it prints
    the first texts of its dictionary of IDs.
    """
    from featurestore.published import open_published
    from trainer.schema import suggest_mapping as logs
    from trainer.schema import suggest_schema as samples

    if (run_path(data) / "config.yaml").is_file():
        if out is not None:
            raise SchemaError(f"{data} is a run's folder, of which no schema is written; leave --out out")
        _show_dictionary(run_path(data), SHOWN)
        return
    storage = open_published(data)
    if has_lists(storage):
        schema, made, table = samples.inspect_samples(storage, label, group, rows)
        text = samples.render(schema, made, table, data)
    else:
        text = logs.render(logs.inspect_logs(storage, rows), data)
    if out is None:
        sys.stdout.write(text)
    else:
        _write_new(out, text)


@app.command(epilog="Example: `python -m trainer.schema check schema.yaml data/samples`")
def check(
    schema: Annotated[Path, typer.Argument(help="YAML file.")],
    data: Annotated[str, typer.Argument(help="Folder or address of sample groups with train/ and test/.")],
) -> None:
    """Read every sample as a run would, and say the first thing that does not fit the schema.

    Of numbers that are scaled or cut into buckets, what the training samples say of them is printed.
    """
    from trainer.comm import SoloComm
    from trainer.runs.known_statistics import statistics_of
    from trainer.samples.reader import SampleReader, open_index
    from trainer.samples.statistics import fill_in, measure

    fields = load_schema(schema)
    for split in ("train", "test"):
        index = open_index(SoloComm(), data, split, fields)
        if split == "train":
            fields = fill_in(fields, measure(SoloComm(), index, fields))
            for name, values in statistics_of(fields).items():
                print_summary(f"{name}  {json.dumps(values)}")
        for _ in SampleReader(index, fields, batch_size=BATCH_SIZE).batches():
            pass
        print_summary(f"{split:<6} {index.num_samples:,} samples in {index.num_groups:,} groups fit the schema")


@app.command(
    epilog="Examples:\n\n"
    "    python -m trainer.schema lookup data/runs/both -8127164312765119041\n\n"
    "    python -m trainer.schema lookup data/runs/both sku-17 '[\"shoes\",3]'",
    context_settings={"ignore_unknown_options": True},  # a negative ID is no option
)
def lookup(
    run: Annotated[str, typer.Argument(help="Folder or address of a run whose samples have texts.")],
    values: Annotated[list[str], typer.Argument(help="IDs, whose texts to print, or texts, whose IDs to print.")],
) -> None:
    """Print the text of an ID, and the ID that a text gets.

    The text of an ID of crossed columns is a JSON list of their values.
    """
    from trainer.samples.dictionary import IdDictionary

    dictionary = IdDictionary.of_run(run_path(run))
    if dictionary is None:
        raise DataNotFoundError(
            f"{run} has no ids.parquet: its training samples have no texts, or it is no run's folder"
        )
    ids = [id_of_text(value) for value in values]
    texts = dictionary.texts([*ids, *(key_of_uri(value) for value in values)])
    for value, number in zip(values, ids, strict=True):
        # A text that is a whole number is an ID; as a uri it has a key of its own.
        found = {each: texts[each] for each in (number, key_of_uri(value)) if each in texts}
        for each, text in (found or {number: "not in the training samples as a text"}).items():
            print_summary(f"{each}  {text}")


def _show_dictionary(run: RunPath, count: int) -> None:
    from trainer.samples.dictionary import FILE, IdDictionary

    dictionary = IdDictionary.of_run(run)
    if dictionary is None:
        print_summary(f"{run} has no {FILE}: its training samples have no texts")
        return
    entries, total = dictionary.first(count)
    print_summary(f"{dictionary.path}: {total:,} texts of the training samples and their ids; the first of them:")
    for number, text in entries:
        print_summary(f"{number}  {text}")


def has_lists(storage: "Storage") -> bool:
    """Tell whether the first file has columns of lists of numbers, as sample groups do and raw logs do not.

    Of samples it is one in train/ or test/: other files are next to these, as bad rows. Raises DataError where there is
    no file.
    """
    from trainer.schema.profile import content_of, data_files, inner_type, read_tables
    from trainer.schema.suggest_schema import sample_files

    files = sample_files(storage) or data_files(storage)
    if not files:
        raise DataNotFoundError(f"{storage.url}: no .parquet, .csv or .tsv files")
    for table in read_tables(storage, files[0], 1):
        types = [inner_type(field.type) for field in table.schema]
        return any(depth and content_of(kind) in ("integer", "real") for kind, depth in types)
    return False


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise SchemaError(f"--out {path} is there already; name another file, or remove it") from error
    except OSError as error:
        raise TrainerError(f"--out {path} cannot be written: {error}") from error
    print_summary(f"written      {path}")


if __name__ == "__main__":
    run_app(app, "python -m trainer.schema")
