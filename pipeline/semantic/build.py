"""Semantic IDs from vectors to samples: fit or take a codebook, assign codes, rewrite the samples, publish at once."""

from typing import Any

from featurestore.console.files import write_json
from featurestore.console.output import progress_bar
from featurestore.errors import StorageError
from featurestore.published import open_published
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from featurestore.text import parse_json
from pipeline.errors import SampleError, SampleOptionError
from pipeline.options import DEFAULT_STORE, SemanticOptions
from pipeline.samples.publish import CODEBOOK_FILE, MARK, SEMANTIC_IDS, replaced_files
from pipeline.samples.schema import schema_of_samples
from pipeline.semantic import codebook as books
from pipeline.semantic.codebook import Codebook
from pipeline.semantic.codes import FOLDER, AssignedCodes, assign, changed_keys, read_codes
from pipeline.semantic.samples import (
    WITHOUT_CODE,
    EarlierSamples,
    RewrittenSamples,
    earlier_samples,
    rewrite,
    sample_files,
)
from pipeline.semantic.schema import image_columns, write_code_schema
from pipeline.semantic.vectors import StoreVectors, Vectors, open_file
from trainer.schema import Schema, load_schema

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
