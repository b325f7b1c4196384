"""Figures of a running scorer, out of its /metrics: how many requests, how quick each stage, what was unknown."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import orjson

from serving.scoring.remote import RemoteScorer

STAGES = ("read", "wait", "parse", "score", "encode")
_LINE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_TIMEOUT_S = 5.0

Series = dict[str, list[tuple[dict[str, str], float]]]


@dataclass(frozen=True)
class Quantiles:
    """How long something took, in seconds: half of the times, and 99 of 100, were shorter, as histograms tell."""

    count: int
    p50_s: float | None
    p99_s: float | None


@dataclass(frozen=True)
class LookedUp:
    """Values of a field that requests had, and how many of them the model did not know."""

    field: str
    values: int
    unknown: int
    missing: int


@dataclass(frozen=True)
class ScorerFigures:
    """What a server says of itself."""

    name: str
    version: int | None
    vectors: Mapping[str, int]
    age_s: Mapping[str, float]
    """Of the vectors, by store: since they were committed."""
    requests: Mapping[str, int]
    """Answers of /v1/score by status."""
    whole: Quantiles
    stages: Mapping[str, Quantiles]
    candidates: int
    fields: tuple[LookedUp, ...]


def read_figures(scorer: RemoteScorer) -> ScorerFigures:
    """Ask a server for its figures. Raises ServingError."""
    about = orjson.loads(scorer.read("/", timeout_s=_TIMEOUT_S))
    series = parse(scorer.read("/metrics", timeout_s=_TIMEOUT_S).decode())
    by_field = {name: _by(series, f"serving_{name}_total", "field") for name in ("values", "unknown", "missing")}
    route = {"route": "/v1/score"}
    return ScorerFigures(
        name=str(about["name"]),
        version=about["version"],
        vectors=about["vectors"] or {},
        age_s=_by(series, "serving_vectors_age_seconds", "store"),
        requests={
            labels["code"]: int(value)
            for labels, value in series["serving_requests_total"]
            if labels.get("route") == route["route"]
        },
        whole=quantiles(series, "serving_request_seconds", route),
        stages={stage: quantiles(series, "serving_stage_seconds", {"stage": stage}) for stage in STAGES},
        candidates=int(sum(value for _, value in series["serving_candidates_total"])),
        fields=tuple(
            LookedUp(
                field,
                int(count),
                int(by_field["unknown"].get(field, 0)),
                int(by_field["missing"].get(field, 0)),
            )
            for field, count in by_field["values"].items()
        ),
    )


def parse(text: str) -> Series:
    """Read Prometheus' text format: for each name its series, labels and value."""
    found: Series = defaultdict(list)
    for line in text.splitlines():
        if match := _LINE.match(line):
            name, labels, value = match.groups()
            found[name].append((dict(_LABEL.findall(labels or "")), float(value)))
    return found


def quantiles(series: Series, name: str, labels: Mapping[str, str]) -> Quantiles:
    """Estimate p50 and p99 of a histogram, as Prometheus' histogram_quantile does: evenly spread within a bucket.

    A value beyond the last bound counts as that bound.
    """
    buckets = sorted(
        (float(found["le"]), count)
        for found, count in series[f"{name}_bucket"]
        if all(found.get(key) == value for key, value in labels.items())
    )
    total = buckets[-1][1] if buckets else 0.0
    return Quantiles(int(total), *(_quantile(buckets, share * total) if total else None for share in (0.5, 0.99)))


def _quantile(buckets: list[tuple[float, float]], rank: float) -> float:
    low, before = 0.0, 0.0
    for high, count in buckets:
        if count >= rank:
            if high == float("inf"):
                return low
            inside = count - before
            return low + (high - low) * ((rank - before) / inside if inside else 1.0)
        low, before = high, count
    return low


def _by(series: Series, name: str, label: str) -> dict[str, float]:
    return {labels[label]: value for labels, value in series[name] if label in labels}
