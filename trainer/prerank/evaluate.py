"""Searches of an index with users of a two-tower run as queries: recall, time, ads.

For runs opened by one rank. Letters of shapes: K queries, C candidates found of each, W width of the vectors.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featurestore.index import VectorIndex, use_threads
from featurestore.keys import id_of_text
from trainer.errors import DataError, DataNotFoundError, SchemaError
from trainer.prerank.artifact import NUM_QUERIES, AdIndex, Queries, recall_at, sample_of
from trainer.prerank.vectors import towers, user_vectors
from trainer.runs.open import test_reader
from trainer.runs.saved import TEST, TRAIN, TrainedRun, open_test
from trainer.samples.index import SampleIndex, open_index
from trainer.samples.reader import Batch, SampleReader

Vectors = NDArray[np.float32]
_GROUPS_PER_QUERY = 4  # a user has several


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
    """Results of K searches. `recall`: by number of candidates, the share of the best ads that the index found."""

    queries: int
    effort: int | None
    recall: dict[int, float]
    index: Timing
    exact: Timing


def reader_of_tests(trained: TrainedRun, samples: str | None) -> SampleReader:
    """Open the test impressions of `samples`, else of the run. Raises DataError, SchemaError."""
    index = open_test(trained.comm, trained.config, trained.schema, samples)
    return test_reader(trained.config, trained.comm, index, trained.schema)


def search_figures(
    ads: AdIndex, queries_KW: Vectors, counts: Sequence[int], effort: int | None = None
) -> SearchFigures:
    """Measure recall and time of searches for these users; K >= 1.

    Exact is a flat index over the exported vectors. Times are of the largest of `counts`.
    """
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


def users_of_tests(trained: TrainedRun, samples: str | None, most: int) -> Queries:
    """Compute vectors of at most `most` users of the first test impressions of `samples`, else of the run.

    Raises DataError, SchemaError."""
    index = open_test(trained.comm, trained.config, trained.schema, samples)
    return sample_of(_first_users(trained, index, _GROUPS_PER_QUERY * most), "users", most)


def user_queries(trained: TrainedRun) -> Queries | None:
    """Compute user vectors from the run's own samples, of the test days if there are any, to measure an index.

    None where the samples are gone or empty.
    """
    data = trained.config.data
    for split, days in ((TEST, data.test_days), (TRAIN, data.train_days)):
        if days == []:
            continue
        try:
            index = open_index(trained.comm, data.samples, split, trained.schema, days)
            users_KW = _first_users(trained, index, _GROUPS_PER_QUERY * NUM_QUERIES)
        except (DataError, SchemaError):
            continue
        if len(users_KW):
            return sample_of(users_KW, "users")
    return None


def candidates(
    trained: TrainedRun, ads: AdIndex, samples: str | None, user: str, count: int
) -> list[tuple[int, float]]:
    """Find keys and inner products of the best ads for a user, as of the user's last test group.

    `user`: a number or a text, as the samples have it. Raises DataError where no test sample is of that user.
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
