"""Samples with semantic IDs: built from samples and codes.

Letters of shapes: G groups, N values of a column.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.console.files import write_json
from featurestore.console.output import progress_bar
from featurestore.errors import StorageError
from featurestore.keys import Int64Array
from featurestore.parsing import parse_json, parse_yaml
from featurestore.published.versions import open_published
from featurestore.storage.storage import Storage, settled_tags
from featurestore.store import FeatureStore
from pipeline.errors import SampleError, SampleOptionError
from pipeline.options import DEFAULT_STORE, SemanticOptions
from pipeline.samples.build import schema_of_samples, write_schema
from pipeline.samples.publish import CODEBOOK_FILE, MARK, SEMANTIC_IDS, NewFiles, digest_of, replaced_files
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
    changed_keys,
    open_file,
    read_codes,
)
from trainer.schema import Field, Schema, load_schema
from trainer.schema.fields import SETTINGS_FILE, schema_text, table_rows

SPLITS = ("train", "test")
WITHOUT_CODE = "without_code.parquet"


@dataclass
class FileCounts:
    """The counts of a rewritten file; tag and digest are those of the file that it was made from."""

    tag: str
    digest: str
    groups: int = 0
    references: int = 0
    references_without_code: int = 0


@dataclass
class RewrittenSamples:
    """The counts of rewritten samples, by the paths of their files, and the images without a code in each."""

    files: dict[str, FileCounts] = dataclasses.field(default_factory=dict)
    keys_without_code: dict[str, set[int]] = dataclasses.field(default_factory=dict)
    kept: int = 0
    """Files that are as they were."""

    def report(self) -> dict[str, Any]:
        """Sum the counts up; those of each file are for the next time."""
        names = ("groups", "references", "references_without_code")
        sums = {name: sum(getattr(each, name) for each in self.files.values()) for name in names}
        without = len(set().union(*self.keys_without_code.values()))
        sources = {path: asdict(each) for path, each in self.files.items()}
        return {"files": len(self.files), **sums, "images_without_code": without, "sources": sources}

    def write_keys(self, path: Path) -> None:
        """Write which images of each file have no code."""
        rows = [(name, sorted(keys)) for name, keys in self.keys_without_code.items()]
        names = [name for name, keys in rows for _ in keys]
        keys = [key for _, keys in rows for key in keys]
        pq.write_table(pa.table({"file": pa.array(names, pa.string()), "key": pa.array(keys, pa.int64())}), path)


@dataclass(frozen=True)
class EarlierSamples:
    """Samples that an earlier run rewrote with the same codebook; `changed_keys`: images with another code now."""

    storage: Storage
    rewritten: RewrittenSamples
    changed_keys: Int64Array

    def same(self, samples: Storage, path: str, tag: str, columns: Sequence[str]) -> str | None:
        """Find the file that `path` of the samples would be rewritten to again: from equal bytes, with equal codes."""
        name = path.partition("/")[2]
        for earlier in (path, *(f"{split}/{name}" for split in SPLITS)):  # days move from test to train
            counts = self.rewritten.files.get(earlier)
            if counts is None or not (counts.tag == tag != "" or counts.digest == digest_of(samples, path)):
                continue
            return None if self._has_changed(earlier, columns) else earlier
        return None

    def _has_changed(self, path: str, columns: Sequence[str]) -> bool:
        """Return whether the file has an image with another code now; it is read only where any code has changed."""
        if not len(self.changed_keys):
            return False
        without = np.array(sorted(self.rewritten.keys_without_code.get(path, ())), np.int64)
        if np.isin(without, self.changed_keys).any():
            return True
        for table in _row_groups(self.storage, path, columns):
            for column in columns:
                array: Any = table.column(column).combine_chunks()
                keys_N = array.flatten().to_numpy(zero_copy_only=False)
                if np.isin(keys_N, self.changed_keys).any():
                    return True
        return False


def earlier_samples(storage: Storage, recorded: dict[str, Any], changed_keys: Int64Array) -> EarlierSamples | None:
    """Open what an earlier run wrote, by its summary; None where that lacks its files, or one is missing or damaged."""
    try:
        files = {path: FileCounts(**each) for path, each in recorded["samples"]["sources"].items()}
        with storage.open_input(WITHOUT_CODE) as file:
            table = pq.read_table(file)
    except (KeyError, TypeError, FileNotFoundError, pa.ArrowException, StorageError):
        return None
    keys: dict[str, set[int]] = {}
    for row in table.to_pylist():
        keys.setdefault(row["file"], set()).add(row["key"])
    return EarlierSamples(storage, RewrittenSamples(files, keys), changed_keys)


def code_columns(column: str, num_levels: int) -> dict[str, tuple[str, int]]:
    """Name the columns that an image column gets: the code of each level, and prefixes of two codes and more.

    Each with what it is: ("level", 0) … or ("prefix", 2) …
    """
    names = {f"{column}_sid{level}": ("level", level) for level in range(num_levels)}
    return names | {f"{column}_sid_prefix{length}": ("prefix", length) for length in range(2, num_levels + 1)}


def rewrite(
    samples: Storage,
    new: NewFiles,
    columns: Iterable[str],
    index: CodeIndex,
    earlier: EarlierSamples | None = None,
) -> RewrittenSamples:
    """Write every file of `samples`/SPLIT to the new files, with `code_columns` of the image `columns` added.

    Files that `earlier` has, and would get the same bytes, are kept: of these the bytes are read at most, and the
    image columns where an image has another code now. Images without a code get NO_CODE, and are counted. Raises
    SampleError for a column that is missing or no list of whole numbers, and where there is no file.
    """
    done, names = RewrittenSamples(), list(columns)
    tags = settled_tags(entry for split in SPLITS for entry in samples.entries(split, recursive=False))
    for split in SPLITS:
        (new.folder / split).mkdir()
    for path in sample_files(samples):
        tag = tags.get(path, "")
        if earlier is not None and (same := earlier.same(samples, path, tag, names)):
            before = earlier.rewritten
            new.keep(path, same)
            done.files[path] = FileCounts(**asdict(before.files[same]) | {"tag": tag})
            done.keys_without_code[path] = before.keys_without_code.get(same, set())
            done.kept += 1
            continue
        done.files[path], done.keys_without_code[path] = FileCounts(tag, digest_of(samples, path)), set()
        _rewrite_file(samples, path, new.folder / path, names, index, done)
    return done


def sample_files(storage: Storage) -> list[str]:
    """List the files of samples. Raises SampleOptionError where there is none."""
    found = [f"{split}/{name}" for split in SPLITS for name in storage.list(split) if name.endswith(".parquet")]
    if not found:
        raise SampleOptionError(
            f"{storage.full('')}: no train/*.parquet or test/*.parquet; --samples is a folder of samples"
        )
    return found


def _rewrite_file(
    storage: Storage, path: str, target: Path, columns: list[str], index: CodeIndex, done: RewrittenSamples
) -> None:
    writer: pq.ParquetWriter | None = None
    for read in _row_groups(storage, path):
        table = read
        for column in columns:
            table = _with_codes(table, column, index, storage.full(path), done, path)
        writer = writer or pq.ParquetWriter(target, table.schema, compression="zstd", write_page_checksum=True)
        writer.write_table(table, row_group_size=max(1, len(table)))
        done.files[path].groups += len(table)
    if writer is not None:
        writer.close()


def _row_groups(storage: Storage, path: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    try:
        with pq.ParquetFile(storage.open_input(path), page_checksum_verification=True) as file:
            for number in range(file.num_row_groups):
                yield file.read_row_group(number, columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError, StorageError) as error:
        raise SampleError(f"{storage.full(path)}: cannot be read: {error}") from error


def _with_codes(
    table: pa.Table, column: str, index: CodeIndex, where: str, done: RewrittenSamples, path: str
) -> pa.Table:
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
    done.files[path].references += len(keys_N)
    done.files[path].references_without_code += int(without_N.sum())
    done.keys_without_code[path].update(np.unique(keys_N[without_N]).tolist())
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
    """Make `options.out` anew: codebook, codes by key, and the samples with codes as columns; return its summary.

    Equal vectors, samples and options give equal files on one machine. Schema and settings for the trainer are written
    with the samples. With the codebook of what is there already, files of samples that would get the same bytes are
    kept. Holds 16 bytes an image, then 32. Raises SampleError, VectorImportError, SchemaError, FeatureStoreError.
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
    before, recorded = _before(options, codebook)
    with replaced_files(
        options.out, SEMANTIC_IDS, before=before, scratch=options.scratch, keep_days=options.keep_days
    ) as new:
        folder = new.folder
        (folder / CODEBOOK_FILE).write_bytes(codebook.to_bytes())
        with progress_bar("assigning codes", vectors.num_parts) as bar:
            assigned = assign(vectors, codebook, folder / FOLDER, bar.advance)
        rewritten: RewrittenSamples | None = None
        if samples is not None and schema:
            columns = image_columns(schema, options.store_name)
            earlier = _earlier(before, recorded, list(columns), assigned)
            rewritten = rewrite(samples, new, columns, assigned.index, earlier)
            rewritten.write_keys(folder / WITHOUT_CODE)
        summary = _summary(vectors, options, codebook, assigned, rewritten)
        if samples is not None and schema:
            summary["samples"]["columns"] = list(columns)
            write_code_schema(folder, options.out, samples, schema, options.store_name, summary)
        write_json(folder / MARK, summary)
    return summary


def _before(options: SemanticOptions, codebook: Codebook) -> tuple[Storage | None, dict[str, Any]]:
    """Open what an earlier run made with the same codebook, and read its summary; None where there is no such thing."""
    if options.codebook is None or not options.samples:
        return None, {}
    before = open_published(options.out)
    try:
        recorded: dict[str, Any] = parse_json(before.read_bytes(MARK))
        is_same = recorded["codebook"]["sha256"] == codebook.digest
    except (FileNotFoundError, StorageError, ValueError, KeyError, TypeError):
        return None, {}
    return (before, recorded) if is_same else (None, {})


def _earlier(
    before: Storage | None, recorded: dict[str, Any], columns: list[str], assigned: AssignedCodes
) -> EarlierSamples | None:
    if before is None or recorded.get("samples", {}).get("columns") != columns:
        return None
    changed = changed_keys(read_codes(before, assigned.index.num_codes), assigned.index)
    return earlier_samples(before, recorded, changed)


def _open(options: SemanticOptions) -> Vectors:
    if options.vectors is not None:
        return open_file(options.vectors, options.keys)
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


def _summary(
    vectors: Vectors,
    options: SemanticOptions,
    codebook: Codebook,
    assigned: AssignedCodes,
    rewritten: RewrittenSamples | None,
) -> dict[str, Any]:
    summary: dict[str, Any] = {
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
    if rewritten is not None:
        summary["samples"] = {"from": options.samples, "kept": rewritten.kept, **rewritten.report()}
    return summary


def image_columns(schema: Schema, store_name: str) -> dict[str, Field]:
    """Find the first content field of one store for each column. Raises SampleOptionError where there is none."""
    fields = list(schema.of_kind("content"))
    columns: dict[str, Field] = {}
    for field in fields:
        if field.store_name == store_name:
            columns.setdefault(field.column_name, field)
    if not columns:
        known = ", ".join(sorted({field.store_name for field in fields})) or "none"
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
    for field in image_columns(schema, store_name).values():
        for name, (what, number) in code_columns(field.column_name, len(levels)).items():
            table = f"{store_name}_sid{number}" if what == "level" else f"{store_name}_sid_prefix{number}"
            used = levels[number]["used"] if what == "level" else levels[number - 1]["distinct_prefixes"]
            tables[table] = table_rows(used + 1)
            kind: Any = "id" if field.side == "ad" else "multi_id"
            fields.append(Field(name=name, side=field.side, kind=kind, table=table))
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
