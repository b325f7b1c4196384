"""Metrics for Prometheus: requests, latency by stage, candidates, unknown values, versions, queue and switches.

With several workers, prometheus-client keeps the metrics of each process in files of one folder, and any worker answers
with their sum (multiprocess mode). The library chooses this mode when it is imported, by the variable
PROMETHEUS_MULTIPROC_DIR, which serving/http/workers.py sets for its worker processes.
"""

import asyncio
import contextlib
import os
import struct
import time
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from serving.http.codec import Scores
from trainer.schema.fields import Field

if TYPE_CHECKING:
    from serving.scoring.scorer import Scorer

MetricT = TypeVar("MetricT", Counter, Histogram)

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_FLUSH_S = 0.5
_MOST_READINGS = 10
_SCORES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0)
"""Bounds, closer where click rates are."""


class ServingMetrics:
    """All metrics of a worker, with their names in /metrics."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = CollectorRegistry()
        self._registry = registry
        self._children: dict[tuple[object, ...], Any] = {}
        self._waiting: defaultdict[tuple[Counter, str], int] = defaultdict(int)
        """Counts by counter and field."""
        self._scores_K, self._sum_of_scores = np.zeros(len(_SCORES) + 1, np.int64), 0.0
        counter = partial(Counter, registry=registry)
        histogram = partial(Histogram, registry=registry)
        seconds = partial(histogram, buckets=_SECONDS)
        self.requests = counter("serving_requests", "Answers by route and status code", ["route", "code"])
        self.seconds = seconds("serving_request_seconds", "Seconds from a request's headers to its answer", ["route"])
        self.stages = seconds(
            "serving_stage_seconds",
            "Seconds of a scored body in each stage: read, wait, parse, score, encode",
            ["stage"],
        )
        self.candidates = counter("serving_candidates", "Candidates scored")
        self.scores = histogram("serving_scores", "Click probabilities of candidates", buckets=_SCORES)
        self.values = counter("serving_values", "Values by field that were looked up", ["field"])
        self.unknown = counter("serving_unknown", "IDs by field whose row no training sample had", ["field"])
        self.missing = counter("serving_missing", "Images by field without a vector", ["field"])
        self.switches = counter("serving_switches", "Newer models by result: switched or refused", ["result"])
        lowest = self._lowest = partial(Gauge, registry=registry, multiprocess_mode="livemin")
        highest = partial(Gauge, registry=registry, multiprocess_mode="livemax")
        total = partial(Gauge, registry=registry, multiprocess_mode="livesum")
        self._version: Gauge | None = None  # a worker without a model reports no value instead of 0
        self._snapshot = lowest("serving_vectors_snapshot", "Snapshot of the vectors in use", ["store"])
        self._age = highest("serving_vectors_age_seconds", "Seconds since the vectors in use were committed", ["store"])
        self.queue = total("serving_queue_bodies", "Bodies that wait for the model")
        self.predicted = highest("serving_predicted_wait_seconds", "Seconds that a body arriving now would wait")
        self.ready = total("serving_ready_workers", "Workers with a warmed-up model")
        if FOLDER_VARIABLE not in os.environ:
            for collector in (ProcessCollector, PlatformCollector, GCCollector):
                collector(registry=registry)

    def record_model(self, model: "Scorer", switched: bool) -> None:
        """Record the model in use, and whether it replaces another one."""
        if self._version is None:
            self._version = self._lowest("serving_model_version", "Version of the bundle that answers")
        self._version.set(model.identity.version)
        for store, snapshot in model.identity.vectors.items():
            self._snapshot.labels(store).set(snapshot)
        self.record_age(model)
        self.ready.set(1)
        if switched:
            self.switches.labels("switched").inc()

    def record_age(self, model: "Scorer") -> None:
        """Record the age of the vectors."""
        for store, table in model.vectors.items():
            self._age.labels(store).set(max(0.0, time.time() - table.time_s))

    def record_answer(self, route: str, code: int, seconds: float) -> None:
        """Count an answer and the time it took."""
        self._child(self.requests, route, code).inc()
        self._child(self.seconds, route).observe(seconds)

    def record_scored(self, scores: Scores) -> None:
        """Count a body's candidates, its values by field, unknown and missing ones, and the time of each stage.

        Counts by field, and of scores by bucket, are buffered until `flush`: adding them one by one takes a tenth of a
        request's time and more. A killed worker loses those of its last half second.
        """
        num_candidates = sum(len(each.logits_C) for each in scores.scored)
        self.candidates.inc(num_candidates)
        waiting = self._waiting
        for field in scores.fields:
            if field.kind != "dense":
                count = num_candidates if field.side == "ad" else _count(field, scores)
                waiting[self.values, field.name] += count
        score_C = np.concatenate([np.empty(0, np.float32), *(each.probabilities() for each in scores.scored)])
        self._scores_K += np.bincount(np.searchsorted(_SCORES, score_C), minlength=len(self._scores_K))
        self._sum_of_scores += float(score_C.sum())
        for each in scores.scored:
            for counter, places in ((self.unknown, each.unknown), (self.missing, each.missing)):
                for name, found in places.items():
                    waiting[counter, name] += len(found)
        for stage, seconds in scores.stages.items():
            self._child(self.stages, stage).observe(seconds)

    def flush(self) -> None:
        """Add the buffered counts of `record_scored` to the metrics."""
        counts_K, self._scores_K = self._scores_K, np.zeros_like(self._scores_K)
        total, self._sum_of_scores = self._sum_of_scores, 0.0
        if counts_K.any():  # the library has no public way to observe several values at once
            self.scores._sum.inc(total)
            for bucket, count in zip(self.scores._buckets, counts_K.tolist(), strict=True):
                bucket.inc(count)
        waiting, self._waiting = self._waiting, defaultdict(int)
        for (counter, field), count in waiting.items():
            if count:
                self._child(counter, field).inc(count)

    async def flush_often(self) -> None:
        """Flush twice a second, until cancelled."""
        while True:
            self.flush()
            await asyncio.sleep(_FLUSH_S)

    def _child(self, metric: MetricT, *labels: str | int) -> MetricT:
        """Return a metric's series with these labels, cached, as prometheus_client is slow at this."""
        found: MetricT | None = self._children.get((metric, *labels))
        if found is None:
            found = self._children[metric, *labels] = metric.labels(*labels)
        return found

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format, summed over all workers."""
        if FOLDER_VARIABLE not in os.environ:
            return generate_latest(self._registry)
        for _ in range(_MOST_READINGS):
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
            with contextlib.suppress(struct.error, ValueError, OSError):  # a worker makes its file at this moment
                return generate_latest(registry)
            time.sleep(0.01)
        return generate_latest(registry)


def _count(field: Field, scores: Scores) -> int:
    """Count the values of a user field in the same way as its places are counted."""
    column = scores.sent.columns.get(field.columns[0] if field.columns else field.column_name)
    if column is None:
        return 0
    return int(column.levels[0].sum()) if column.levels else len(column.values)
