"""Division of the inputs of several users into blocks of candidates of one user each."""

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from serving.network.inputs import FieldRows, Int64, NearestRows, NetworkInputs


def split_by_user(
    inputs: NetworkInputs, of_user: Collection[str], at_most: int, most_pairs: int
) -> Iterator[NetworkInputs]:
    """Divide the inputs into blocks of one user and 1 to `at_most` candidates, in their order, by views.

    A block has fewer candidates if their number times the user's longest list exceeds `most_pairs`, but at least one.
    Inputs that are a single block are returned as they are. `of_user`: the fields of side user.
    """
    longest_G = np.ones(inputs.num_groups, np.int64)
    for name in inputs.fields.keys() & of_user:
        longest_G = np.maximum(longest_G, inputs.fields[name].lengths_M)
    at_most_G = np.clip(most_pairs // longest_G, 1, at_most)
    if inputs.num_groups == 1 and 0 < len(inputs.group_of_sample_B) <= at_most_G[0]:
        yield inputs
        return
    fields = {name: _FieldRows.of(field) for name, field in inputs.fields.items()}
    ends_similar = {name: _ends(each.lengths_B) for name, each in inputs.similar.items()}
    for user, start, end in _blocks(inputs, at_most_G):
        at = {True: (user, user + 1), False: (start, end)}
        yield NetworkInputs(
            group_of_sample_B=np.zeros(end - start, np.int64),
            num_groups=1,
            fields={name: rows.cut(*at[name in of_user]) for name, rows in fields.items()},
            dense={name: rows_MW[slice(*at[name in of_user])] for name, rows_MW in inputs.dense.items()},
            similar={
                name: _nearest(each, ends_similar[name], start, end, int(fields[name].ends_M[user]))
                for name, each in inputs.similar.items()
            },
        )


def _blocks(inputs: NetworkInputs, at_most_G: Int64) -> Iterator[tuple[int, int, int]]:
    """List the user of each block, with the range of its candidates."""
    starts_G = np.searchsorted(inputs.group_of_sample_B, np.arange(inputs.num_groups + 1)).tolist()
    for user, (first, last) in enumerate(itertools.pairwise(starts_G)):
        at_most = int(at_most_G[user])
        for start in range(first, last, at_most):
            yield user, start, min(start + at_most, last)


@dataclass(frozen=True)
class _FieldRows:
    """A field, and where the values of each row, and the images of each gallery, begin and end."""

    field: FieldRows
    ends_M: Int64
    """(M + 1,): row m has the values from `ends_M[m]` to `ends_M[m + 1]`."""
    ends_K: Int64 | None

    @classmethod
    def of(cls, field: FieldRows) -> "_FieldRows":
        return cls(field, _ends(field.lengths_M), None if field.sizes_K is None else _ends(field.sizes_K))

    def cut(self, start: int, end: int) -> FieldRows:
        """Return the rows from `start` to `end`."""
        field = self.field
        values = images = slice(self.ends_M[start], self.ends_M[end])
        if self.ends_K is not None:
            images = slice(self.ends_K[values.start], self.ends_K[values.stop])
        return FieldRows(
            rows_NV=field.rows_NV[images],
            lengths_M=field.lengths_M[start:end],
            weights_N=None if field.weights_N is None else field.weights_N[values],
            sizes_K=None if field.sizes_K is None else field.sizes_K[values],
        )


def _nearest(all_users: NearestRows, ends_B: Int64, start: int, end: int, first_value: int) -> NearestRows:
    """Cut out the candidates from `start` to `end`, whose behaviours begin at `first_value` of the field."""
    return NearestRows(
        tiers_BT=all_users.tiers_BT[start:end],
        nearest_N=all_users.nearest_N[ends_B[start] : ends_B[end]] - first_value,
        lengths_B=all_users.lengths_B[start:end],
    )


def _ends(lengths_M: Int64) -> Int64:
    ends_M = np.zeros(len(lengths_M) + 1, np.int64)
    np.cumsum(lengths_M, out=ends_M[1:])
    return ends_M
