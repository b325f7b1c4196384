"""Measure pre-ranking by a run and its index: GAUC of the towers, recall of the index, time of a search.

Letters of shapes: K queries, C candidates found of each, W width of the vectors.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featurestore.index import VectorIndex, use_threads
from featurestore.keys import id_of_text
from trainer.errors import DataError, DataNotFoundError, SchemaError
from trainer.evaluation.predict import Metrics, evaluate
from trainer.prerank.artifact import NUM_QUERIES, AdIndex, Queries, recall_at, sample_of
from trainer.prerank.vectors import towers, user_vectors
from trainer.runs.checkpoint import samples_digest
from trainer.runs.open import test_reader
from trainer.runs.saved import TEST, TRAIN, TrainedRun, finite, open_test
from trainer.samples.reader import Batch, ReadAhead, SampleIndex, SampleReader, known_ads, open_index

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Timing:
    """Searches one by one, each on one thread, and all of them together on that thread."""

    queries_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    batched_queries_per_s: float


@dataclass(frozen=True)
class SearchFigures:
    """What K searches gave. `recall`: by number of candidates, the share of the best ads that the index found."""

    queries: int
    effort: int | None
    recall: dict[int, float]
    index: Timing
    exact: Timing


@dataclass(frozen=True)
class TowerScore:
    """Metrics of a run on test impressions, the vectors of all test groups, (K, W), and what a reader should know."""

    metrics: Metrics
    users_KW: Vectors
    notes: list[str]


def reader_of_tests(trained: TrainedRun, samples: str | None) -> SampleReader:
    """Open the test impressions of `samples`, else of the run: this rank's part. Raises DataError, SchemaError."""
    index = open_test(trained.comm, trained.config, trained.schema, samples)
    return test_reader(trained.config, trained.comm, index, trained.schema)


def score(trained: TrainedRun, samples: str | None) -> TowerScore:
    """Measure the run on the test impressions of `samples`, else on its own; the same on every rank.

    An ad is new where the run's training samples do not have it. Every rank calls it. Raises DataError, SchemaError,
    TrainerError.
    """
    comm, engine, model, data = trained.comm, trained.engine, towers(trained), trained.config.data
    kept = [torch.empty(0, model.width)]
    reader = reader_of_tests(trained, samples)
    here = data.samples if samples else reader.index.storage
    train = open_index(comm, here, TRAIN, trained.schema, data.train_days)

    def network(fields: Any, dense: Any, group_of_sample_B: Tensor) -> Tensor:
        kept.append(model.user_vectors(fields, dense).cpu())
        logit_B: Tensor = model(fields, dense, group_of_sample_B)
        return logit_B

    def predicted(batches: Iterator[Batch]) -> Iterator[tuple[Batch, NDArray[np.float64]]]:
        for prepared in engine.prepared(batches, "eval"):
            yield prepared.batch, engine.compute(prepared, network)

    with contextlib.closing(ReadAhead(reader.batches(), data.prefetch_batches)) as ahead:
        metrics = evaluate(comm, predicted(ahead), known_ads(comm, train, trained.schema), trained.schema.new_ad_field)
    users_KW = finite(comm.allgather(torch.cat(kept).float(), "user_vectors").numpy())
    notes = trained.saved.notes_on_missing(trained.missing_lookups())
    recorded = trained.saved.state.origin.data.get("samples_digest")
    changed = samples_digest(comm, train, data.cache_dir) != recorded
    return TowerScore(metrics, users_KW, [*trained.saved.notes_on_samples(changed), *notes])


def search_figures(
    ads: AdIndex, users_KW: Vectors, counts: Sequence[int], max_queries: int, effort: int | None = None
) -> SearchFigures:
    """Measure recall and time of searches for at most `max_queries` users, drawn by a fixed seed; K >= 1.

    Exact is a flat index over the exported vectors. Times are of the largest of `counts`.
    """
    chosen_K = np.random.default_rng(0).permutation(len(users_KW))[:max_queries]
    queries_KW = np.ascontiguousarray(users_KW[np.sort(chosen_K)])
    exact = VectorIndex.build("flat", *ads.vectors())
    use_threads(1)
    most = max(counts)
    return SearchFigures(
        queries=len(queries_KW),
        effort=effort or ads.index.effort,
        recall={count: recall_at(ads.index, exact, queries_KW, count, effort) for count in sorted(set(counts))},
        index=_timed(ads.index, queries_KW, most, effort),
        exact=_timed(exact, queries_KW, most, None),
    )


def report_of(trained: TrainedRun, ads: AdIndex, scored: TowerScore, figures: SearchFigures) -> dict[str, Any]:
    """Return everything, ready for JSON."""
    state = ads.state
    return {
        "run": str(trained.saved.folder),
        "checkpoint": trained.saved.path.name,
        "store_version": trained.store_version,
        "index": {
            "kind": state.kind,
            "version": state.version,
            "dim": state.dim,
            "ads": state.num_ads,
            "unused": state.num_unused,
        },
        "metrics": scored.metrics,
        "search": asdict(figures),
        "notes": [*scored.notes, *([ads.warning] if ads.warning else [])],
    }


def user_queries(trained: TrainedRun) -> Queries | None:
    """Compute vectors of users of the run's own samples, of the test days if there are any, to measure an index with.

    For a run opened by one rank. None where the samples are gone or empty.
    """
    data = trained.config.data
    for split, days in ((TEST, data.test_days), (TRAIN, data.train_days)):
        if days == []:
            continue
        try:
            index = open_index(trained.comm, data.samples, split, trained.schema, days)
            users_KW = _first_users(trained, index, 4 * NUM_QUERIES)
        except (DataError, SchemaError):
            continue
        if len(users_KW):
            return sample_of(users_KW, "users")
    return None


def candidates(
    trained: TrainedRun, ads: AdIndex, samples: str | None, user: str, count: int
) -> list[tuple[int, float]]:
    """Find keys and inner products of the ads that suit a user best, as the user was in their last test group.

    For one rank. `user`: a number or a text, as the samples have it. Raises DataError where no test sample is of that
    user.
    """
    last: Batch | None = None
    number = id_of_text(user)
    for batch in reader_of_tests(trained, samples).batches():
        if (batch.group_id_B == number).any():
            last = batch
    if last is None:
        where = samples or trained.config.data.samples
        raise DataNotFoundError(f"user {user} has no test sample in {where}; choose one that has, or other --samples")
    _, vectors_GW = next(user_vectors(trained, iter([last])))
    group = last.group_of_sample_B[last.group_id_B == number][-1]
    keys_1C, score_1C = ads.index.search(vectors_GW[group : group + 1], count)
    return [(int(key), float(value)) for key, value in zip(keys_1C[0], score_1C[0], strict=True) if np.isfinite(value)]


def _first_users(trained: TrainedRun, index: SampleIndex, wanted: int) -> Vectors:
    """Vectors of the first `wanted` groups, or of all."""
    reader = test_reader(trained.config, trained.comm, index, trained.schema)
    parts = [np.empty((0, towers(trained).width), np.float32)]
    for _, users_GW in user_vectors(trained, reader.batches()):
        parts.append(users_GW)
        if sum(map(len, parts)) >= wanted:
            break
    return np.concatenate(parts)[:wanted]


def _timed(index: VectorIndex, queries_KW: Vectors, count: int, effort: int | None) -> Timing:
    seconds = []
    for query_W in queries_KW:
        start = time.perf_counter()
        index.search(query_W[None], count, effort)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    index.search(queries_KW, count, effort)
    batched_s = time.perf_counter() - start
    p50, p95, p99 = np.percentile(np.array(seconds) * 1000, [50, 95, 99]).tolist()
    return Timing(len(seconds) / sum(seconds), p50, p95, p99, len(seconds) / batched_s)
