"""Counts of keys in batches that are drawn from the samples, cut into ranks and dealt out to owners."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from featurestore.keys import owner_of, shard_of, splitmix64
from trainer.exchange.routing import Int64
from trainer.plan.cost import KeyCounts, owner_skew
from trainer.plan.growth import GrowthCurve, GrowthPoint, fit
from trainer.samples.batch import Batch

_SPANS = 8
_SMALLEST = 64
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class DrawnSamples:
    """Many samples in the order in which an epoch has them, as one batch, and the fields of each source.

    Fields of one source (one E over a store, one ID table) share its keys: a key in two of them is asked for once.
    """

    batch: Batch
    sources: tuple[tuple[str, ...], ...]
    user_fields: frozenset[str]
    num_shards: int

    @property
    def num_samples(self) -> int:
        """Count the samples."""
        return self.batch.num_samples

    def keys_of(self, span: range) -> list[Int64]:
        """Return the keys of each source in samples `span`, with repetitions; a cut group has its user fields."""
        return [np.concatenate([self._values(name, span)[0] for name in names]) for names in self.sources]

    def references(self) -> float:
        """Return the keys of a sample, user fields once per group."""
        return sum(len(keys_N) for keys_N in self.keys_of(range(self.num_samples))) / self.num_samples

    def draws(self) -> float:
        """Return the keys of a sample, without those that repeat within a group."""
        total = 0
        for names in self.sources:
            found = [self._values(name, range(self.num_samples)) for name in names]
            values_N = splitmix64(np.concatenate([values for values, _ in found]))
            groups_N = np.concatenate([groups for _, groups in found]).astype(np.uint64)
            total += len(np.unique(values_N ^ (groups_N * _ODD)))
        return total / self.num_samples

    def spans(self, samples: int) -> Iterator[range]:
        """Yield up to eight spans of `samples` samples, evenly spread, none of them overlapping another."""
        count = min(_SPANS, self.num_samples // samples)
        for number in range(count):
            start = (self.num_samples - samples) * number // max(1, count - 1)
            yield range(start, start + samples)

    def unique(self, samples: int) -> float:
        """Count the different keys among those of `samples` samples, mean over spans."""
        counts = [sum(len(np.unique(keys_N)) for keys_N in self.keys_of(span)) for span in self.spans(samples)]
        return float(np.mean(counts))

    def _values(self, name: str, span: range) -> tuple[Int64, Int64]:
        """Return the values of a field, and the group of each."""
        jagged, group_B = self.batch.fields[name], self.batch.group_of_sample_B
        rows = range(int(group_B[span.start]), int(group_B[span.stop - 1]) + 1)
        of_user = name in self.user_fields
        if not of_user:
            rows = span
        ends_M = np.cumsum(jagged.lengths_M, dtype=np.int64)
        lengths_M = jagged.lengths_M[rows.start : rows.stop]
        first = int(ends_M[rows.start]) - int(jagged.lengths_M[rows.start])
        group_M = np.arange(rows.start, rows.stop) if of_user else group_B[rows.start : rows.stop]
        return jagged.values_N[first : int(ends_M[rows.stop - 1])], np.repeat(group_M, lengths_M)


@dataclass(frozen=True)
class KeyPopulation:
    """Keys of one kind, in any number of samples and ranks: drawn where there is so much data, else by the curve."""

    references: float
    curve: GrowthCurve
    num_shards: int
    drawn: DrawnSamples | None = None

    def keys(self, samples: int, ranks: int) -> KeyCounts:
        """Count the keys of a global batch of `samples` on `ranks`."""
        if self.drawn is not None and samples <= self.drawn.num_samples:
            return drawn_keys(self.drawn, samples, ranks, self.references)
        unique, asked = self.curve.unique(samples), self.curve.unique(samples / ranks)
        skew = owner_skew(unique, ranks, self.num_shards)
        return KeyCounts(
            references=self.references * samples,
            asked=asked,
            served=asked * skew,
            unique=unique,
            owned=unique * skew / ranks,
            extrapolated=self.curve.is_extrapolated(samples),
        )


def population(drawn: DrawnSamples, sizes: Sequence[int], most: float) -> KeyPopulation:
    """Make the population of the keys in `drawn`, its curve with all `sizes` that have data. `most`: keys at all."""
    wanted = {size for size in sizes if size <= drawn.num_samples} | {drawn.num_samples}
    size = drawn.num_samples // 2
    while size >= _SMALLEST:
        wanted.add(size)
        size //= 2
    points = [GrowthPoint(size, drawn.unique(size)) for size in sorted(wanted)]
    return KeyPopulation(drawn.references(), fit(points, drawn.draws(), most), drawn.num_shards, drawn)


def drawn_keys(drawn: DrawnSamples, samples: int, ranks: int, references: float) -> KeyCounts:
    """Count the keys of global batches that are cut into the slices of `ranks` ranks, mean over the batches."""
    found = np.array([_of_batch(drawn, span, ranks) for span in drawn.spans(samples)]).mean(axis=0)
    asked, served, unique, owned = (float(each) for each in found)
    return KeyCounts(references * samples, asked, served, unique, owned)


def _of_batch(drawn: DrawnSamples, span: range, ranks: int) -> tuple[float, float, float, float]:
    """Count keys asked by a rank, keys that the busiest owner is asked for, unique keys, those of the busiest owner."""
    served_P, owned_P = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    for rank in range(ranks):
        part = range(span.start + len(span) * rank // ranks, span.start + len(span) * (rank + 1) // ranks)
        if part:
            for keys_N in drawn.keys_of(part):
                served_P += _by_owner(np.unique(keys_N), drawn.num_shards, ranks)
    for keys_N in drawn.keys_of(span):
        owned_P += _by_owner(np.unique(keys_N), drawn.num_shards, ranks)
    return float(served_P.sum()) / ranks, float(served_P.max()), float(owned_P.sum()), float(owned_P.max())


def _by_owner(keys_U: Int64, num_shards: int, ranks: int) -> Int64:
    return np.bincount(owner_of(shard_of(keys_U, num_shards), ranks), minlength=ranks)
