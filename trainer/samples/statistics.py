"""Statistics of the training samples that scale numbers and cut them into buckets: one pass, the same for any ranks.

Every row group gives its own part: count, mean and squared distances of each number, and up to some thousand of its
values at equal distances in their order. Parts are merged in the order of the row groups, in float64, so no bit hangs
on which rank read which. A schema with its statistics filled in is a schema like any other: the checkpoint's origin has
it, and who opens the run takes it from there. Letters: W numbers a row, S values kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.format.statistics import Moments
from trainer.comm import Comm
from trainer.errors import DataError
from trainer.samples.columns import Rule, before_scaling, filled, rules_of
from trainer.samples.index import RowGroup, SampleIndex, measured_once, read_values
from trainer.schema import Field, Schema
from trainer.schema.fields import STANDARDIZED

Float64 = NDArray[np.float64]
_KEPT_VALUES = 1 << 20
"""Values from which quantiles are taken, over all row groups; each is off by at most half a kept value of its group."""
_LEAST_KEPT = 64
_METHOD = 1  # raise it when the measurement changes, so that cached statistics are measured again
FOUND = ("mean", "std", "boundaries")
DECLARED = ("kind", "width", "transform", "buckets", "fill")
"""The settings of a field that determine its statistics, besides the numbers in its column."""


@dataclass(frozen=True)
class NumberSums:
    """A summary of a field's numbers in one or several row groups; missing ones are only counted."""

    moments_W: tuple[Moments, ...]
    missing: int
    smallest_W: Float64
    largest_W: Float64
    kept_S: Float64
    """For buckets: values of the row groups one after the other, each group's ascending."""
    counts_S: Float64
    """Number of values that each of them represents."""

    @classmethod
    def of_all(cls, parts: Sequence["NumberSums"]) -> "NumberSums":
        """Merge the parts of several row groups, in their order."""
        return cls(
            tuple(reduce(Moments.merged, each) for each in zip(*(part.moments_W for part in parts), strict=True)),
            sum(part.missing for part in parts),
            np.minimum.reduce([part.smallest_W for part in parts]),
            np.maximum.reduce([part.largest_W for part in parts]),
            np.concatenate([part.kept_S for part in parts]),
            np.concatenate([part.counts_S for part in parts]),
        )


def fill_in(schema: Schema, found: Mapping[str, Mapping[str, Any]]) -> Schema:
    """Fill in the statistics in `found` for each field that lacks them, if its settings are the same."""

    def filled_in(field: Field) -> Field:
        theirs, mine = found.get(field.name, {}), field.model_dump(mode="json", exclude_none=True)
        if not field.lacks_statistics or any(mine.get(name) != theirs.get(name) for name in DECLARED):
            return field
        new = {name: theirs[name] for name in FOUND if name in theirs and name not in mine}
        return Field.model_validate(mine | new)

    return schema.model_copy(update={"fields": tuple(map(filled_in, schema.fields))})


def fields_to_measure(schema: Schema) -> tuple[Field, ...]:
    """List the fields that the training samples have to tell something of."""
    return tuple(field for field in schema.fields if field.lacks_statistics)


def measure(comm: Comm, index: SampleIndex, schema: Schema) -> dict[str, dict[str, Any]]:
    """Measure the statistics of fields that lack them in the samples of `index`, for `fill_in`; every rank calls it.

    Each rank reads every P-th row group, of the columns needed. Raises DataError on all ranks together, where a value
    cannot be used or a field has none.
    """
    fields, rules = fields_to_measure(schema), rules_of(schema)
    if not fields:
        return {}
    budget = max(_LEAST_KEPT, _KEPT_VALUES // max(len(index.row_groups), 1))
    mine = index.row_groups[comm.rank :: comm.size]
    own = comm.on_all(lambda: list(_parts(index, mine, fields, rules, budget)))
    by_rank = comm.allgather_object(own, name="statistics")
    in_order = [by_rank[number % comm.size][number // comm.size] for number in range(len(index.row_groups))]
    return {f.name: _statistics(f, NumberSums.of_all([parts[f.name] for parts in in_order])) for f in fields}


def with_statistics(
    comm: Comm, index: SampleIndex, schema: Schema, samples_digest: str, cache_dir: str | None = None
) -> Schema:
    """Fill in the statistics of the samples of `index`.

    Results are cached on rank 0's machine, by the digest of the samples. Every rank calls it.
    Raises DataError on all ranks together."""
    fields = fields_to_measure(schema)
    if not fields:
        return schema
    asked = [_METHOD, samples_digest, [field.model_dump(mode="json") for field in fields]]
    return fill_in(schema, measured_once(comm, index, "inputs", asked, cache_dir, lambda: measure(comm, index, schema)))


def _parts(
    index: SampleIndex, row_groups: Sequence[RowGroup], fields: Sequence[Field], rules: Mapping[str, Rule], budget: int
) -> Iterator[dict[str, NumberSums]]:
    """Of each of the row groups."""
    wanted = {field.column_name: rules[field.column_name] for field in fields}
    for values in read_values(index, row_groups, wanted):
        yield {field.name: part_of(field, values[field.column_name], budget) for field in fields}


def part_of(field: Field, values_N: NDArray[Any], budget: int) -> NumberSums:
    """Summarise these values of a field; of buckets at most `budget` values are kept."""
    width = field.width or 1 if field.kind == "dense" else 1
    numbers_MW = filled(field, values_N) if field.is_bucketed else before_scaling(field, values_N)
    numbers_MW = numbers_MW.reshape(-1, width)
    present = [column[~np.isnan(column)] for column in numbers_MW.T]
    everything = np.concatenate(present)
    kept_S = np.sort(everything) if field.is_bucketed else np.empty(0)
    each = 1.0
    if len(kept_S) > budget:
        each = len(kept_S) / budget
        kept_S = kept_S[((np.arange(budget) + 0.5) * each).astype(np.int64)]
    return NumberSums(
        tuple(_moments(column) for column in present),
        numbers_MW.size - len(everything),
        np.array([column.min(initial=np.inf) for column in present]),
        np.array([column.max(initial=-np.inf) for column in present]),
        kept_S,
        np.full(len(kept_S), each),
    )


def quantile_boundaries(part: NumberSums, buckets: int) -> tuple[float, ...]:
    """Find where `buckets` equally full buckets begin, but for the first; fewer, where a value fills more than one."""
    order_S = np.argsort(part.kept_S, kind="stable")
    kept_S, until_S = part.kept_S[order_S], np.cumsum(part.counts_S[order_S])
    shares = np.arange(1, buckets) / buckets * until_S[-1]
    starts = np.unique(kept_S[np.searchsorted(until_S, shares, side="right")])
    return tuple(starts[starts > part.smallest_W.min()].tolist())


def _moments(column_M: Float64) -> Moments:
    if not len(column_M):
        return Moments.empty(1)
    mean = column_M.mean()
    return Moments(len(column_M), np.array([mean]), np.array([np.square(column_M - mean).sum()]))


def _statistics(field: Field, part: NumberSums) -> dict[str, Any]:
    """A constant column has a deviation of 1, so that it becomes zero and not NaN."""
    counts = [moments.count for moments in part.moments_W]
    if not all(counts):
        raise DataError(
            f"field {field.name}: column {field.column_name} has no number in the training samples, so there is no "
            f"{'bucket' if field.is_bucketed else 'mean'} to be found; leave the field out, or give mean, std or "
            "boundaries in the schema"
        )
    found = field.model_dump(mode="json", exclude_none=True)
    if field.is_bucketed:
        assert isinstance(field.buckets, int)
        return found | {"boundaries": list(quantile_boundaries(part, field.buckets))}
    if field.mean is None:
        found["mean"] = [float(moments.mean_D[0]) for moments in part.moments_W]
    if field.std is None and field.transform in STANDARDIZED:
        std_W = np.array([np.sqrt(moments.m2_D[0] / moments.count) for moments in part.moments_W])
        found["std"] = np.where(part.smallest_W < part.largest_W, std_W, 1.0).tolist()
    return found
