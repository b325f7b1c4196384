"""The list of test impressions: sorted by the images' effect on scores; filtered by user, ad, picture or click.

The first MOST impressions of the test samples are scored, with and without images, once for each checkpoint. A user who
is not among them is searched in all samples. Letters of shapes: N impressions, G groups.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from explorer.data.impressions.explained import Score
from explorer.data.impressions.groups import GroupColumns
from explorer.data.impressions.open_runs import Logits, OpenedRun
from featurestore.keys import Int64Array, key_of_uri

if TYPE_CHECKING:
    from trainer.samples.columns import ColumnRows, DecodedGroups
    from trainer.samples.index import RowGroup


Order = Literal["effect", "raised", "lowered", "score", "order"]
Clicked = Literal["any", "yes", "no"]
ORDERS: dict[Order, str] = {
    "effect": "largest effect of the images",
    "raised": "raised most by the images",
    "lowered": "lowered most by the images",
    "score": "highest score",
    "order": "order of the samples",
}
CLICKED: dict[Clicked, str] = {"any": "clicked or not", "yes": "clicked", "no": "not clicked"}
MOST = 20_000
_MOST_GROUPS_OF_USER = 100


class Listed(NamedTuple):
    """An impression of the list."""

    group: int
    place: int
    user: str
    ad: int
    picture: int | None
    """Key of the ad's (first) picture."""
    clicked: bool
    score: Score
    without_images: Score

    @property
    def effect(self) -> float:
        """The images' effect on the click probability."""
        return self.score.probability - self.without_images.probability


@dataclass(frozen=True)
class ScoredImpressions:
    """Impressions with their scores, with and without images."""

    group_N: NDArray[np.int64]
    place_N: NDArray[np.int64]
    user_N: NDArray[np.int64]
    ad_N: NDArray[np.int64]
    picture_N: NDArray[np.int64] | None
    label_N: NDArray[np.bool_]
    logit_N: Logits
    without_N: Logits
    users: dict[int, str]
    """The user of each group, as in the logs."""
    total: int
    """Number of impressions in the samples."""

    @property
    def num(self) -> int:
        """Number of impressions scored here."""
        return len(self.logit_N)

    def chosen(self, order: Order, clicked: Clicked, query: str) -> NDArray[np.int64]:
        """Return the numbers of the impressions that match a query, best first.

        `query`: a user, an ad, a picture's key or uri; empty: all.
        """
        wanted_N = np.ones(self.num, np.bool_)
        if clicked != "any":
            wanted_N &= self.label_N == (clicked == "yes")
        if query:
            wanted_N &= self._matching(query)
        found = np.flatnonzero(wanted_N)
        if order == "order":
            return found
        moved_N = self._probability(self.logit_N[found]) - self._probability(self.without_N[found])
        by = {"effect": np.abs(moved_N), "raised": moved_N, "lowered": -moved_N, "score": self.logit_N[found]}[order]
        ordered: Int64Array = found[np.argsort(-by, kind="stable")]
        return ordered

    def rows(self, numbers: Sequence[int] | NDArray[np.int64]) -> list[Listed]:
        """Return the impressions with these numbers."""
        return [
            Listed(
                group=int(self.group_N[n]),
                place=int(self.place_N[n]),
                user=self.users[int(self.group_N[n])],
                ad=int(self.ad_N[n]),
                picture=None if self.picture_N is None else int(self.picture_N[n]),
                clicked=bool(self.label_N[n]),
                score=Score(float(self.logit_N[n])),
                without_images=Score(float(self.without_N[n])),
            )
            for n in numbers
        ]

    def _matching(self, query: str) -> NDArray[np.bool_]:
        ids = ids_of(query)
        wanted_N = np.isin(self.user_N, ids) | np.isin(self.ad_N, ids)
        if self.picture_N is not None:
            wanted_N |= np.isin(self.picture_N, ids)
        return wanted_N

    @staticmethod
    def _probability(logit_N: Logits) -> Logits:
        with np.errstate(over="ignore"):
            return 1 / (1 + np.exp(-logit_N))


def scored_of(opened: OpenedRun) -> ScoredImpressions:
    """Score the first impressions, or return them from the cache."""
    if "scored" not in opened.kept:
        opened.kept["scored"] = score_first(opened)
    scored: ScoredImpressions = opened.kept["scored"]
    return scored


def score_first(opened: OpenedRun, most: int = MOST) -> ScoredImpressions:
    """Score the first impressions of the run's test samples, about `most`. Raises DataError."""
    row_groups = opened.index.row_groups
    starts = np.cumsum([0, *(each.num_samples for each in row_groups)])[:-1]
    kept = row_groups[: max(1, int((starts < most).sum()))]
    scored = _Collected(GroupColumns(opened))
    first = 0
    for row_group in kept:
        rows = np.arange(min(row_group.num_groups, most - scored.num))  # each has at least one impression
        scored.add(row_group, rows, first, most - scored.num)
        first += row_group.num_groups
    return scored.done()


def score_user(opened: OpenedRun, query: str) -> ScoredImpressions:
    """Find a user in all test samples, and score up to _MOST_GROUPS_OF_USER of the user's groups.

    Reads one column of all files. Raises DataError.
    """
    from trainer.samples.columns import source_columns, values_of
    from trainer.samples.index import read_row_groups

    columns, index = GroupColumns(opened), opened.index
    name, ids = opened.schema.group, ids_of(query)
    rule = columns.rules[name]
    scored, first, num_groups = _Collected(columns), 0, 0
    for row_group, table in read_row_groups(index.storage, index.row_groups, list(source_columns({name: rule}))):
        user_G = values_of(table, name, rule, index.storage.full(row_group.file), row_group.first_row)
        rows = np.flatnonzero(np.isin(user_G, ids))[: _MOST_GROUPS_OF_USER - num_groups]
        if len(rows):
            scored.add(row_group, rows, first, MOST)
            num_groups += len(rows)
        first += row_group.num_groups
        if num_groups >= _MOST_GROUPS_OF_USER:
            break
    return scored.done()


def ids_of(query: str) -> list[int]:
    """List the IDs that a typed word may stand for: a number, a text's hash, the key of a uri."""
    from trainer.samples.columns import encode_texts

    found = [key_of_uri(query), *encode_texts(pa.array([query], pa.string()), "id").ids_U.tolist()]
    try:
        number = int(query)
    except ValueError:
        return found
    return [*found, number] if -(2**63) <= number < 2**63 else found


_INTEGERS = ("group_N", "place_N", "user_N", "ad_N", "picture_N")
_KINDS = dict.fromkeys(_INTEGERS, np.int64) | {"label_N": np.bool_, "logit_N": np.float64, "without_N": np.float64}
"""The columns of scored impressions."""


@dataclass
class _Collected:
    """Impressions that are scored so far."""

    columns: GroupColumns
    parts: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    users: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    """The user of each group, as the samples have one: several values of crossed columns."""
    num: int = 0

    def add(self, row_group: "RowGroup", rows: NDArray[np.int64], first: int, most: int) -> None:
        """Score groups of a row group, whose first one is number `first` of all, until there are `most` impressions."""
        from trainer.samples.columns import plain
        from trainer.samples.index import read_row_group

        opened, storage = self.columns.opened, self.columns.opened.index.storage
        table = plain(read_row_group(storage, row_group, list(self.columns.sources))).take(rows)
        groups = self.columns.decode(table, storage.full(row_group.file), row_group.first_row)
        num_G = int(np.searchsorted(groups.sample_offsets, most, side="left"))
        for begin, end in _slices(groups.sample_offsets[: num_G + 1], opened.trained.config.train.eval_batch_size):
            batch = self.columns.batch(groups, slice(begin, end))
            part = self._columns(groups, begin, end, first + rows[begin:end])
            part |= {"logit_N": opened.logits(batch), "without_N": opened.logits_without_images(batch)}
            self.parts.append(part)
            self.num += len(part["logit_N"])
        name = opened.schema.group
        columns = [table.column(each).to_pylist() for each in (self.columns.rules[name].crossed or (name,))]
        users = zip(*columns, strict=True)
        self.users |= {first + int(row): user for row, user in zip(rows, users, strict=True)}

    def done(self) -> ScoredImpressions:
        """Concatenate all parts, and name the users."""
        names = iter(self.columns.opened.texts(itertools.chain.from_iterable(self.users.values())))
        users = {group: " × ".join(next(names) for _ in values) for group, values in self.users.items()}
        together = {
            name: np.concatenate([part[name] for part in self.parts]) if self.parts else np.empty(0, kind)
            for name, kind in _KINDS.items()
        }
        picture_N = together.pop("picture_N")
        return ScoredImpressions(
            **together,
            picture_N=picture_N if self.columns.ad_image is not None else None,
            users=users,
            total=self.columns.opened.index.num_samples,
        )

    def _columns(
        self, groups: "DecodedGroups", begin: int, end: int, number_G: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """Read what the list shows of the impressions of some groups, which have these numbers."""
        schema = self.columns.opened.schema
        offsets = groups.sample_offsets[begin : end + 1]
        counts_G, samples = np.diff(offsets), slice(int(offsets[0]), int(offsets[-1]))
        starts_G = offsets[:-1] - offsets[0]
        image = self.columns.ad_image
        column = groups.columns[image.column_name] if image else None
        return {
            "group_N": np.repeat(number_G, counts_G),
            "place_N": np.arange(counts_G.sum()) - np.repeat(starts_G, counts_G),
            "user_N": np.repeat(groups.columns[schema.group].values[begin:end], counts_G),
            "ad_N": _firsts(groups.columns[schema.new_ad_column])[samples],
            "picture_N": _firsts(column)[samples] if column else np.zeros(counts_G.sum(), np.int64),
            "label_N": groups.columns[schema.label].values[samples] == 1,
        }


def _slices(offsets: Int64Array, most: int) -> list[tuple[int, int]]:
    """Cut groups into slices of about `most` samples each."""
    cuts, begin = [], 0
    while begin < len(offsets) - 1:
        end = max(begin + 1, int(np.searchsorted(offsets, offsets[begin] + most, side="right")) - 1)
        cuts.append((begin, end))
        begin = end
    return cuts


def _firsts(column: "ColumnRows") -> NDArray[np.int64]:
    """Return the first value of each row, or 0."""
    if column.offsets is None:
        return column.values
    starts, ends = column.offsets[:-1], column.offsets[1:]
    padded = np.append(column.values, 0)
    return np.where(starts < ends, padded[starts], 0)
