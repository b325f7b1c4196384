"""A request to the scorer, its size and cost, and its answer, independent of the protocol.

Letters of shapes: C candidates of a request, G requests of a body.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from serving.scoring.budget import Budget
from trainer.samples.columns import Index, Rule

Places = NDArray[np.int64]
_LOWEST = -700.0  # its probability is 0 in float32, and exp does not overflow yet
CANDIDATE_COST, REQUEST_COST = 10, 1_000
"""Cost of a candidate and of a request, in pairs of a candidate and a behaviour."""
PIECE_REQUESTS, PIECE_CANDIDATES, PIECE_VALUES = 64, 2_048, 20_000
"""Most pairs of a piece, unless it is a single request."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One user and C candidates, with the columns of the samples and the raw values of logs.

    `user` has the columns of side user, lists for behaviours; `candidates` those of side ad, a list of C each;
    `context` columns of side ad that are the same for all candidates (the scene), one value each.
    """

    user: Mapping[str, Any]
    candidates: Mapping[str, Sequence[Any]]
    context: Mapping[str, Any] = field(default_factory=dict)
    as_tensors: bool = False
    """Whether its columns were sent as tensors of the Open Inference Protocol, which have no parts."""

    def name_of(self, part: str, column: str) -> str:
        """Name a column in a message as the client sent it: `candidates.ad_item`, or `input ad_item` of a tensor."""
        return f"input {column}" if self.as_tensors else f"{part}.{column}"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The answer to a request: a logit for each candidate, in order, and its unknown IDs and missing images.

    `unknown`: by field, the places (ad side: of candidates; user side: of values) whose ID no training sample had.
    `missing`: by content field, the places whose image has no vector; the run's policy replaced it.
    """

    logits_C: NDArray[np.float32]
    unknown: Mapping[str, Places]
    missing: Mapping[str, Places]

    def probabilities(self) -> NDArray[np.float32]:
        """Compute the probability of a click of each candidate, 1 / (1 + exp(-logit)), (C,)."""
        logits_C = np.maximum(self.logits_C.astype(np.float64), _LOWEST)
        return (1 / (1 + np.exp(-logits_C))).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large each request of a body is, (G,)."""

    candidates_G: Index
    behaviors_G: Index
    """Length of the user's longest list."""
    values_G: Index
    """Entries of all lists of the request."""

    def __len__(self) -> int:
        return len(self.candidates_G)

    @property
    def pairs(self) -> Index:
        """Candidates times behaviours of each request, (G,)."""
        return self.candidates_G * self.behaviors_G

    @property
    def cost(self) -> int:
        """The approximate cost of all requests together; a pair of a candidate and a behaviour costs 1."""
        per_request_G = CANDIDATE_COST * self.candidates_G + self.pairs + self.values_G
        return REQUEST_COST * max(1, len(self)) + int(per_request_G.sum())

    def pieces(self) -> Iterator[slice]:
        """Cut the requests into pieces that are scored at a time."""
        start = candidates = values = 0
        for place, (own_candidates, own_values) in enumerate(
            zip(self.candidates_G.tolist(), self.values_G.tolist(), strict=True)
        ):
            candidates, values = candidates + own_candidates, values + own_values
            is_full = candidates > PIECE_CANDIDATES or values > PIECE_VALUES or place - start >= PIECE_REQUESTS
            if is_full and place > start:
                yield slice(start, place)
                start, candidates, values = place, own_candidates, own_values
        if len(self):
            yield slice(start, len(self))


def check_sizes(budget: Budget, sizes: Sizes) -> None:
    """Raise RequestTooLargeError where a body is too large."""
    for limit, value in (
        ("requests", len(sizes)),
        ("candidates", int(sizes.candidates_G.sum())),
        ("behaviors", int(sizes.behaviors_G.max(initial=0))),
        ("pairs", int(sizes.pairs.sum())),
        ("values", int(sizes.values_G.sum())),
    ):
        budget.check(limit, value)


def check_table(budget: Budget, table: pa.Table) -> None:
    """Raise RequestTooLargeError for a table whose rows, lists or dictionaries are too long.

    Checks only lengths: a few bytes may claim any length of a list of empty lists, and a few rows any text.
    """
    budget.check("requests", table.num_rows)
    text_bytes = 0
    for column in table.columns:
        for chunk in column.chunks:
            inside: Any = (0, 0, chunk)
            while inside is not None:
                budget.check("values", inside[1])
                array = inside[2]
                inside = _inside(array)
            if pa.types.is_dictionary(array.type):
                text_bytes += array.dictionary.nbytes
    budget.check("text_bytes", text_bytes)


def joined(several: Sequence[Sizes]) -> Sizes:
    """Put the sizes of several bodies one after the other."""
    return Sizes(
        candidates_G=np.concatenate([each.candidates_G for each in several]),
        behaviors_G=np.concatenate([each.behaviors_G for each in several]),
        values_G=np.concatenate([each.values_G for each in several]),
    )


def sizes_of(value: Sequence[Request] | pa.Table, columns: Mapping[str, Rule]) -> Sizes:
    """Measure the requests of a body by the lengths of their lists. `columns`: those of the model."""
    if isinstance(value, pa.Table):
        return _sizes_of_table(value, columns)
    return Sizes(
        candidates_G=_counts(max(map(_length, each.candidates.values()), default=0) for each in value),
        behaviors_G=_counts(max(map(_length, each.user.values()), default=0) for each in value),
        values_G=_counts(
            sum(map(_entries, each.user.values())) + sum(map(_entries, each.candidates.values())) for each in value
        ),
    )


def _counts(values: Iterator[int]) -> Index:
    return np.array(list(values), np.int64)


def _length(value: Any) -> int:
    if isinstance(value, list | tuple):
        return len(value)
    return len(value) if isinstance(value, np.ndarray) and value.ndim else 0


def _entries(value: Any) -> int:
    """Count the entries of a list, and of lists in it."""
    count = _length(value)
    return count + sum(map(_length, value)) if count and _length(value[0]) else count


def _sizes_of_table(table: pa.Table, columns: Mapping[str, Rule]) -> Sizes:
    zeros = np.zeros(table.num_rows, np.int64)
    found = Sizes(candidates_G=zeros.copy(), behaviors_G=zeros.copy(), values_G=zeros.copy())
    for name, column in zip(table.column_names, table.columns, strict=True):
        rule = columns.get(name)
        start = 0
        for chunk in column.chunks:
            here = slice(start, start := start + len(chunk))
            levels = _levels(chunk)
            for level in levels:
                found.values_G[here] += level
            if levels and rule is not None and (rule.side == "ad" or rule.width is None):
                longest_G = found.candidates_G if rule.side == "ad" else found.behaviors_G
                longest_G[here] = np.maximum(longest_G[here], levels[0])
    return found


def _levels(array: Any) -> list[Index]:
    """Count the entries of each row of a whole column at each level of lists."""
    ends = np.arange(len(array) + 1)
    levels: list[Index] = []
    while (inside := _inside(array)) is not None:
        first, _, values = inside
        if pa.types.is_fixed_size_list(array.type):
            ends = ends * array.type.list_size
        else:
            ends = array.offsets.to_numpy()[ends].astype(np.int64) - first
        levels.append(np.diff(ends))
        array = values
    return levels


def _inside(array: Any) -> tuple[int, int, Any] | None:
    """Return start, number and values of the entries of lists; None if the array has no lists.

    Copies nothing, whatever lengths the array claims.
    """
    if pa.types.is_fixed_size_list(array.type):
        size = array.type.list_size
        first, count = array.offset * size, len(array) * size
    elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        offsets = array.offsets
        first, last = offsets[0].as_py(), offsets[-1].as_py()
        count = last - first
    else:
        return None
    return first, count, array.values.slice(first, count)
