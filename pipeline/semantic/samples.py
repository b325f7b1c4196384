"""Samples with semantic IDs: built from samples and codes.

Letters of shapes: G groups, N values of a column.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.console.files import write_json
from featurestore.console.output import progress_bar
from featurestore.errors import StorageError
from featurestore.parsing import parse_yaml
from featurestore.published.versions import open_published
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from pipeline.errors import SampleError, SampleOptionError
from pipeline.options import DEFAULT_STORE, SemanticOptions
from pipeline.samples.build import schema_of_samples, write_schema
from pipeline.samples.publish import CODEBOOK_FILE, MARK, SEMANTIC_IDS, SPLITS, replaced_files
from pipeline.semantic import codes as books
from pipeline.semantic.codes import (
    FOLDER,
    NO_CODE,
    AssignedCodes,
    Codebook,
    CodeIndex,
    StoreVectors,
    Vectors,
    assign,
    open_file,
)
from trainer.schema import Field, Schema, load_schema
from trainer.schema.fields import SETTINGS_FILE, schema_text, table_rows


@dataclass
class SampleCounts:
    """The counts of samples with codes, and which images have no code."""

    files: int = 0
    groups: int = 0
    references: int = 0
    references_without_code: int = 0
    keys_without_code: set[int] = field(default_factory=set)

    def report(self) -> dict[str, int]:
        """Give the counts as the summary has them."""
        return {
            "files": self.files,
            "groups": self.groups,
            "references": self.references,
            "references_without_code": self.references_without_code,
            "images_without_code": len(self.keys_without_code),
        }


def code_columns(column: str, num_levels: int) -> dict[str, tuple[str, int]]:
    """Name the columns that an image column gets: the code of each level, and prefixes of two codes and more.

    Each with what it is: ("level", 0) … or ("prefix", 2) …
    """
    names = {f"{column}_sid{level}": ("level", level) for level in range(num_levels)}
    return names | {f"{column}_sid_prefix{length}": ("prefix", length) for length in range(2, num_levels + 1)}


def add_codes(samples: Storage, folder: Path, columns: Iterable[str], index: CodeIndex) -> SampleCounts:
    """Write every file of `samples`/SPLIT to `folder`, with `code_columns` of the image `columns` added.

    Images without a code get NO_CODE, and are counted. Raises SampleError for a column that is missing or no list of
    whole numbers, SampleOptionError where there is no file.
    """
    counts, names = SampleCounts(), list(columns)
    for split in SPLITS:
        (folder / split).mkdir()
    for path in sample_files(samples):
        _write_file(samples, path, folder / path, names, index, counts)
    return counts


def sample_files(storage: Storage) -> list[str]:
    """List the files of samples. Raises SampleOptionError where there is none."""
    found = [f"{split}/{name}" for split in SPLITS for name in storage.list(split) if name.endswith(".parquet")]
    if not found:
        raise SampleOptionError(
            f"{storage.full('')}: no train/*.parquet or test/*.parquet; --samples is a folder of samples"
        )
    return found


def _write_file(
    storage: Storage, path: str, target: Path, columns: list[str], index: CodeIndex, counts: SampleCounts
) -> None:
    writer: pq.ParquetWriter | None = None
    for read in _row_groups(storage, path):
        table = read
        for column in columns:
            table = _with_codes(table, column, index, storage.full(path), counts)
        writer = writer or pq.ParquetWriter(target, table.schema, compression="zstd", write_page_checksum=True)
        writer.write_table(table, row_group_size=max(1, len(table)))
        counts.groups += len(table)
    if writer is not None:
        writer.close()
    counts.files += 1


def _row_groups(storage: Storage, path: str) -> Iterator[pa.Table]:
    try:
        with pq.ParquetFile(storage.open_input(path), page_checksum_verification=True) as file:
            for number in range(file.num_row_groups):
                yield file.read_row_group(number)
    except (pa.ArrowException, OSError, StorageError) as error:
        raise SampleError(f"{storage.full(path)}: cannot be read: {error}") from error


def _with_codes(table: pa.Table, column: str, index: CodeIndex, where: str, counts: SampleCounts) -> pa.Table:
    if column not in table.column_names:
        raise SampleError(f"{where}: column {column!r} is missing; is it the schema of these samples?")
    array: Any = table.column(column).combine_chunks()
    if not pa.types.is_list(array.type) or not pa.types.is_integer(array.type.value_type):
        raise SampleError(f"{where}: column {column!r} is {array.type}, not a list of image keys")
    values: Any = array.flatten()
    if array.null_count or values.null_count:
        raise SampleError(f"{where}: column {column!r} has nulls")
    keys_N = values.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
    full_N = index.lookup(keys_N)
    without_N = full_N == NO_CODE
    counts.references += len(keys_N)
    counts.references_without_code += int(without_N.sum())
    counts.keys_without_code.update(np.unique(keys_N[without_N]).tolist())
    lengths_G = np.diff(array.offsets.to_numpy())
    offsets: Any = pa.array(np.concatenate([[0], np.cumsum(lengths_G)]), pa.int32())
    for name, (what, number) in code_columns(column, index.num_levels).items():
        if name in table.column_names:
            raise SampleError(f"{where}: column {name!r} is there already; name samples without semantic IDs")
        ids_N = index.code(full_N, number) if what == "level" else index.prefix(full_N, number)
        table = table.append_column(name, pa.ListArray.from_arrays(offsets, pa.array(ids_N)))
    return table


_LARGEST_CODE = 1 << 62


def build_semantic_ids(options: SemanticOptions) -> dict[str, Any]:
    """Make `options.out`: codebook, codes by key, and the samples with codes as columns; return its summary.

    Equal vectors, samples and options give equal files on one machine. Schema and settings for the trainer are written
    with the samples. Holds 16 bytes an image. Raises SampleError, VectorImportError, SchemaError, FeatureStoreError.
    """
    schema: Schema | None = None
    samples = open_published(options.samples) if options.samples else None
    if samples is not None:
        sample_files(samples)  # before the store is read through
        schema = load_schema(options.schema or schema_of_samples(samples.url))
        image_columns(schema, options.store_name)
    vectors = _open(options)
    if options.num_codes & (options.num_codes - 1) or options.num_codes < 2:
        raise SampleOptionError(f"--codes {options.num_codes} is not a power of two; try 256")
    if options.num_codes**options.num_levels > _LARGEST_CODE:
        raise SampleOptionError(f"--levels {options.num_levels} of --codes {options.num_codes} do not fit into 62 bits")
    codebook = _codebook(vectors, options)
    with replaced_files(options.out, SEMANTIC_IDS, scratch=options.scratch, keep_days=options.keep_days) as new:
        (new.folder / CODEBOOK_FILE).write_bytes(codebook.to_bytes())
        with progress_bar("assigning codes", vectors.num_parts) as bar:
            assigned = assign(vectors, codebook, new.folder / FOLDER, bar.advance)
        summary = _summary(vectors, options, codebook, assigned)
        if samples is not None and schema is not None:
            counts = add_codes(samples, new.folder, image_columns(schema, options.store_name), assigned.index)
            summary["samples"] = {"from": options.samples, **counts.report()}
            write_code_schema(new.folder, options.out, samples, schema, options.store_name, summary)
        write_json(new.folder / MARK, summary)
    return summary


def _open(options: SemanticOptions) -> Vectors:
    if options.vectors is not None:
        return open_file(options.vectors)
    return StoreVectors(FeatureStore.open(options.store or DEFAULT_STORE).snapshot())


def _codebook(vectors: Vectors, options: SemanticOptions) -> Codebook:
    if options.codebook is None:
        sample_ND = vectors.sample(options.sample_rows, options.seed)
        source = vectors.describe() | {"sample_rows": len(sample_ND), "seed": options.seed}
        standardize = not vectors.are_components if options.standardize is None else options.standardize
        return books.fit(sample_ND, options.num_levels, options.num_codes, options.seed, source, standardize)
    codebook = books.load(options.codebook)
    if codebook.dim != vectors.dim:
        raise SampleError(f"{options.codebook} is for vectors of {codebook.dim} numbers, these have {vectors.dim}")
    books.check_source(codebook.source, vectors.describe(), options.codebook, options.accept_store)
    return codebook


def _summary(vectors: Vectors, options: SemanticOptions, codebook: Codebook, assigned: AssignedCodes) -> dict[str, Any]:
    return {
        "source": vectors.describe(),
        "codebook": {
            "sha256": codebook.digest,
            "fitted": options.codebook is None,
            "levels": codebook.num_levels,
            "codes": codebook.num_codes,
            "of": codebook.source,
        },
        **assigned.report(),
    }


def image_columns(schema: Schema, store_name: str) -> dict[str, Field]:
    """Find the first content field of one store for each column. Raises SampleOptionError where there is none."""
    fields = list(schema.of_kind("content"))
    columns: dict[str, Field] = {}
    for each in fields:
        if each.store_name == store_name:
            columns.setdefault(each.column_name, each)
    if not columns:
        known = ", ".join(sorted({each.store_name for each in fields})) or "none"
        raise SampleOptionError(
            f"the schema has no content field of store {store_name}; its stores: {known} (--store-name)"
        )
    return columns


def write_code_schema(
    folder: Path, target: str, samples: Storage, schema: Schema, store_name: str, summary: dict[str, Any]
) -> None:
    """Write the schema with the codes as ID fields, and settings with their tables, for samples at `target`."""
    fields, tables = list(schema.fields), _tables_of(samples)
    levels = summary["levels"]
    for image in image_columns(schema, store_name).values():
        for name, (what, number) in code_columns(image.column_name, len(levels)).items():
            table = f"{store_name}_sid{number}" if what == "level" else f"{store_name}_sid_prefix{number}"
            used = levels[number]["used"] if what == "level" else levels[number - 1]["distinct_prefixes"]
            tables[table] = table_rows(used + 1)
            kind: Any = "id" if image.side == "ad" else "multi_id"
            fields.append(Field(name=name, side=image.side, kind=kind, table=table))
    header = [
        "Fields of the samples, and the codes of their images: _sid0 is the first code, _sid_prefix2 the first two.",
        f"Codebook {summary['codebook']['sha256'][:16]}; -1 is an image without a code.",
    ]
    made = schema.model_copy(update={"fields": tuple(fields)})
    write_schema(folder, target, schema_text(made, header), tables, summary["source"].get("store"))


def _tables_of(samples: Storage) -> dict[str, int]:
    """Read the tables of the settings that are with the samples already."""
    try:
        return dict(parse_yaml(samples.read_bytes(SETTINGS_FILE).decode())["model"]["tables"])
    except FileNotFoundError:
        return {}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise SampleError(f"{samples.full(SETTINGS_FILE)} has no model.tables: {error}") from error
