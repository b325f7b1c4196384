"""Semantic IDs from vectors to samples: fit or take a codebook, assign codes, rewrite the samples, publish at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featurestore.console.files import write_json
from featurestore.console.progress import progress
from pipeline.errors import SampleError, SampleOptionError
from pipeline.samples.publish import MARK, replaced_folder
from pipeline.semantic import codebook as books
from pipeline.semantic.codebook import Codebook
from pipeline.semantic.codes import FOLDER, Assigned, assign
from pipeline.semantic.samples import Rewritten, rewrite
from pipeline.semantic.vectors import Vectors

_LARGEST_CODE = 1 << 62

Describe = Callable[[dict[str, Any]], Mapping[str, str]]


@dataclass(frozen=True)
class SemanticOptions:
    """`samples` None: codes alone. `codebook`: that of an earlier run, in place of a new one; `accept_store`: also one
    that was fitted to another store of the same network."""

    out: Path
    samples: str | None = None
    num_levels: int = 3
    num_codes: int = 256
    sample_rows: int = 20_000
    seed: int = 0
    standardize: bool = True
    codebook: Path | None = None
    accept_store: bool = False


def build_semantic_ids(
    vectors: Vectors, options: SemanticOptions, columns: Sequence[str], describe: Describe
) -> dict[str, Any]:
    """Makes `options.out` anew and returns its summary: codebook, codes by key, and the samples with codes as columns.

    Equal vectors, samples and options give equal files on one machine. `columns` are the image columns of the samples;
    `describe` gives files to write beside them, by name, from the summary. Holds 16 bytes an image. Raises SampleError,
    VectorImportError, FeatureStoreError.
    """
    if options.num_codes & (options.num_codes - 1) or options.num_codes < 2:
        raise SampleOptionError(f"--codes {options.num_codes} is not a power of two; try 256")
    if options.num_codes**options.num_levels > _LARGEST_CODE:
        raise SampleOptionError(f"--levels {options.num_levels} of --codes {options.num_codes} do not fit into 62 bits")
    with replaced_folder(options.out, "semantic IDs") as folder:
        codebook = _codebook(vectors, options)
        (folder / books.FILE).write_bytes(codebook.to_bytes())
        with progress("assigning codes", vectors.num_parts) as advance:
            assigned = assign(vectors, codebook, folder / FOLDER, advance)
        rewritten = rewrite(options.samples, folder, columns, assigned.index) if options.samples else None
        summary = _summary(vectors, options, codebook, assigned, rewritten)
        for name, text in describe(summary).items() if rewritten else ():
            (folder / name).write_text(text, encoding="utf-8")
        write_json(folder / MARK, summary)
    return summary


def _codebook(vectors: Vectors, options: SemanticOptions) -> Codebook:
    if options.codebook is None:
        sample_ND = vectors.sample(options.sample_rows, options.seed)
        source = vectors.describe() | {"sample_rows": len(sample_ND), "seed": options.seed}
        return books.fit(sample_ND, options.num_levels, options.num_codes, options.seed, source, options.standardize)
    codebook = books.load(options.codebook)
    if codebook.dim != vectors.dim:
        raise SampleError(f"{options.codebook} is for vectors of {codebook.dim} numbers, these have {vectors.dim}")
    books.check_source(codebook.source, vectors.describe(), options.codebook, options.accept_store)
    return codebook


def _summary(
    vectors: Vectors, options: SemanticOptions, codebook: Codebook, assigned: Assigned, rewritten: Rewritten | None
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
        summary["samples"] = {
            "from": options.samples,
            "files": rewritten.files,
            "groups": rewritten.groups,
            "references": rewritten.references,
            "references_without_code": rewritten.references_without_code,
            "images_without_code": len(rewritten.keys_without_code),
        }
    return summary
