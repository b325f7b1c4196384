"""Samples read into batches.

Letters of shapes, here and in the whole package: P ranks, G groups and B samples on this rank, M rows of a side
(G on the user side, B on the ad side), N values of a field, U unique keys asked, R keys received, Q unique among R,
D feature width, V vector width.

The order of an epoch depends on the seed alone: the row groups of all files are shuffled and dealt out to streams (see
trainer.samples.index), and inside each window of a stream the sample groups are shuffled. A global batch has its part
of each stream, one after the other; nothing is dropped, and the last batch is smaller. A group that is cut, between two
batches or two ranks, appears on both sides, with its user fields repeated.

Cost: a rank decodes the streams that it has a share of, and holds one or two windows of each. So with as many streams
as ranks, or more, it decodes little else than its own samples; with one stream, all of them.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from featurestore.keys import Float32Array, Int64Array
from trainer.errors import DataError
from trainer.problems import Problem
from trainer.samples import columns
from trainer.samples import index as sample_index
from trainer.schema.fields import Field, Schema


@dataclass(frozen=True)
class Jagged:
    """Rows of uneven length: row m holds the next `lengths_M[m]` of `values_N`."""

    values_N: Int64Array
    lengths_M: Int64Array


@dataclass(frozen=True)
class BatchPosition:
    """Place of a global batch in the run; both numbers count from zero."""

    epoch: int
    step: int


@dataclass(frozen=True)
class Batch:
    """The samples of one global batch that this rank has; G = B = 0 is a valid batch on any rank."""

    fields: Mapping[str, Jagged]
    """Every id, multi_id and content field; M = G on the user side, M = B on the ad side."""
    dense: Mapping[str, Float32Array]
    """Every dense field, (M, width)."""
    group_of_sample_B: Int64Array
    """Row of the user side that each sample belongs to, in [0, G)."""
    label_B: Float32Array
    group_id_B: Int64Array
    """The user of each sample, for GAUC."""
    global_samples: int
    """Samples of the global batch, over all ranks: the loss is the sum over local samples divided by it."""
    weights: Mapping[str, Float32Array] = field(default_factory=dict)
    """Weights of the fields whose ids have them, one for each value (N,)."""
    place_B: Int64Array | None = None
    """Place of each sample in the global batch; None: in this order, from 0 on."""

    @property
    def num_samples(self) -> int:
        """The number B of samples."""
        return len(self.label_B)

    @property
    def places(self) -> Int64Array:
        """Place of each sample in the global batch."""
        return np.arange(self.num_samples) if self.place_B is None else self.place_B


class Span(NamedTuple):
    """Samples of a stream, by their positions in it, and the place in the global batch of the first of them."""

    stream: int
    positions: range
    place: int


class SampleReader:
    """Batches of one split for one rank.

    `seed` None: in the files' order, for which `streams` has to be 1. `window`: samples that all streams together mix,
    and hold; a row group each at least. Each rank has a part of each global batch.
    """

    def __init__(
        self,
        index: sample_index.SampleIndex,
        schema: Schema,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        batch_size: int,
        seed: int | None = None,
        window: int = 1,
        streams: int = 1,
    ) -> None:
        self.index, self._schema, self._rules = index, schema, columns.rules_of(schema)
        self._rank, self._num_ranks, self._batch_size = rank, num_ranks, batch_size
        self._seed, self._window = seed, window
        self._nothing = sample_index.Piece(columns.no_groups(self._rules), 0, 0)
        self.num_streams = max(1, min(streams, len(index.row_groups)))
        self.num_samples = index.num_samples
        self.num_decoded = 0
        """Samples decoded so far."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, the same on every rank."""
        return -(-self.num_samples // self._batch_size)

    def batches(self, epoch: int = 0, first_step: int = 0) -> Iterator[Batch]:
        """Read this rank's batches from `first_step` of the epoch on; a batch may be without samples.

        Raises DataError.
        """
        streams = self._streams(epoch)
        steps = self._steps([stream.num_samples for stream in streams])
        for spans, global_samples in itertools.islice(steps, first_step, None):
            pieces = [piece for span in spans for piece in streams[span.stream].cut(span.positions)]
            batch = assemble(self._schema, pieces or [self._nothing], global_samples)
            yield replace(batch, place_B=_places(spans))

    def _streams(self, epoch: int) -> list[sample_index.Stream]:
        """Deal out the row groups of an epoch."""
        sizes_R = [each.num_samples for each in self.index.row_groups]
        order_R = np.arange(len(sizes_R))
        if self._seed is not None:
            order_R = np.random.default_rng([self._seed, epoch]).permutation(order_R)
        streams, first = [], 1
        for members in sample_index.deal(sizes_R, order_R.tolist(), self.num_streams):
            windows = sample_index.windows_of(members, sizes_R, self._window // self.num_streams)
            counts_W = [sum(sizes_R[each] for each in window) for window in windows]
            seed = None if self._seed is None else (self._seed, epoch, first)
            streams.append(sample_index.Stream(windows, counts_W, seed, self._decode, self._rules))
            first += len(windows)
        return streams

    def _steps(self, lengths_S: Sequence[int]) -> Iterator[tuple[list[Span], int]]:
        """Yield this rank's part of each batch, and the batch's samples."""
        own = sample_index.shares_by_rank(lengths_S, self._num_ranks)[self._rank]
        for begin_S, count_S in sample_index.batch_parts(lengths_S, self._batch_size):
            place_S = np.cumsum(count_S) - count_S
            spans = []
            for share in own:
                begin, part = int(begin_S[share.stream]), share.of(int(count_S[share.stream]))
                positions = range(begin + part.start, begin + part.stop)
                spans.append(Span(share.stream, positions, int(place_S[share.stream]) + part.start))
            yield spans, int(count_S.sum())

    def _decode(self, number: int) -> columns.DecodedGroups:
        row_group = self.index.row_groups[number]
        table = sample_index.read_row_group(self.index.storage, row_group, list(columns.source_columns(self._rules)))
        full = self.index.storage.full(row_group.file)
        groups = columns.decode(table, self._rules, self._schema.label, full, row_group.first_row)
        if groups.num_samples != row_group.num_samples:
            raise DataError(Problem.SAMPLES_CHANGED, full)
        self.num_decoded += groups.num_samples
        return groups


def assemble(schema: Schema, pieces: Sequence[sample_index.Piece], global_samples: int) -> Batch:
    """Make a batch of these pieces, in their order."""
    counts_G = np.concatenate([piece.counts() for piece in pieces])
    places = [{"user": piece.group_range, "ad": (piece.begin, piece.end)} for piece in pieces]

    @functools.cache  # an image's key and its ID are one column
    def taken(column: str, side: str) -> Jagged:
        rows = [piece.groups.columns[column].between(*place[side]) for piece, place in zip(pieces, places, strict=True)]
        return Jagged(np.concatenate([values for values, _ in rows]), np.concatenate([lengths for _, lengths in rows]))

    group_of_sample_B = np.repeat(np.arange(len(counts_G), dtype=np.int64), counts_G)
    return Batch(
        **inputs_of(schema, lambda field, column: taken(column, field.side)),
        group_of_sample_B=group_of_sample_B,
        label_B=taken(schema.label, "ad").values_N.astype(np.float32),
        group_id_B=taken(schema.group, "user").values_N[group_of_sample_B],
        global_samples=global_samples,
    )


def inputs_of(schema: Schema, taken: Callable[[Field, str], Jagged]) -> dict[str, Any]:
    """Return a batch's inputs of the schema's fields, by the names of `Batch`; `taken` returns rows of a column."""

    def keys(field: Field) -> Jagged:
        rows = taken(field, field.column_name)
        return replace(rows, values_N=columns.bucket_ids(field, rows.values_N)) if field.is_bucketed else rows

    return {
        "fields": {f.name: keys(f) for f in schema.of_kind("id", "multi_id", "content")},
        "dense": {f.name: columns.dense_values(f, taken(f, f.column_name).values_N) for f in schema.of_kind("dense")},
        "weights": {f.name: taken(f, f.weights).values_N for f in schema.fields if f.weights is not None},
    }


def _places(spans: Sequence[Span]) -> Int64Array:
    """Return the place of each sample in the global batch."""
    places = [np.arange(span.place, span.place + len(span.positions)) for span in spans]
    return np.concatenate([np.empty(0, np.int64), *places])
