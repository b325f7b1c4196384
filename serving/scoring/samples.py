"""Scores of sample files with a bundle: row group by row group, by a scorer in this process or one over HTTP."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from serving.errors import NotFiniteError
from serving.scoring.request import sizes_of
from serving.scoring.scorer import Scorer
from trainer.comm import SoloComm
from trainer.errors import DataError
from trainer.evaluation.predict import Written, open_scores
from trainer.runs.saved import TEST
from trainer.samples.columns import Rule
from trainer.samples.index import SampleIndex, open_index, read_row_groups

ScoreTable = Callable[[pa.Table], Sequence[NDArray[np.float32]]]
"""The logits of each row of a table."""


def score_samples(score: ScoreTable, index: SampleIndex, columns: Mapping[str, Rule]) -> Iterator[NDArray[np.float64]]:
    """Score the impressions of each row group of `index`, (B,), in its order. `columns`: those of the model.

    Raises RequestError, DataError.
    """
    for row_group, table in read_row_groups(index.storage, index.row_groups, list(columns)):
        logits: list[NDArray[np.float32]] = []
        for piece in sizes_of(table, columns).pieces():
            try:
                logits += score(table.slice(piece.start, piece.stop - piece.start))
            except NotFiniteError as failure:
                first = f"{index.storage.full(row_group.file)}, from row {row_group.first_row + piece.start}"
                raise DataError(f"{first}: {failure}") from None
        yield np.concatenate(logits).astype(np.float64)


def score_model(url: str, samples: str, out: str, version: int | None = None) -> Written:
    """Score the impressions in test/ of `samples` with a bundle, by default the version in use; write them to `out`.

    The file is like that of `trainer.evaluation.predict`. Raises ServingError, TrainerError, FeatureStoreError.
    """
    with contextlib.closing(Scorer.open(url, version)) as scorer:
        manifest, schema = scorer.bundle.manifest, scorer.bundle.schema
        index = open_index(SoloComm(), samples, TEST, schema)
        about = {
            "model": scorer.bundle.storage.url,
            "version": manifest.version,
            "vectors": dict(scorer.identity.vectors),
            "run": manifest.run,
            "checkpoint": manifest.checkpoint,
            "checkpoint_digest": manifest.checkpoint_digest,
            "samples": index.storage.url,
            "missing": manifest.missing,
        }
        with open_scores(out, index, schema, about) as file:
            logits = score_samples(in_process(scorer), index, scorer.columns)
            for row_group, logit_B in zip(index.row_groups, logits, strict=True):
                file.add(row_group, logit_B)
            return file.written()


def in_process(scorer: Scorer) -> ScoreTable:
    """Return a function that scores a table in this process."""
    return lambda table: [each.logits_C for each in scorer.score_table(table)]
