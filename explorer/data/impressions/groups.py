"""Sample groups (one session of a user, with history and ads), read, changed and batched.

A change is made to the row of the sample file, and the trainer's own reader builds the batch, so that scores are those
of samples with this change. Only a change that samples cannot express (a picture is removed, its ID stays) is made in
the batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from explorer.data.impressions.open_runs import OpenedRun
from explorer.errors import NotHereError
from explorer.problems import Problem
from featurestore.format.datafile import is_text
from featurestore.keys import key_of_uri

if TYPE_CHECKING:
    from trainer.samples.columns import DecodedGroups, Rule
    from trainer.samples.index import RowGroup, SampleIndex
    from trainer.samples.reader import Batch
    from trainer.schema.fields import Field

Row = dict[str, Any]
"""One sample group as a Python dict."""


class PictureName(NamedTuple):
    """A picture as samples name it: by key, and by uri if they have uris."""

    key: int
    uri: str | None


class GroupPlace(NamedTuple):
    """The location of a sample group: its row group, and its row there."""

    row_group: "RowGroup"
    row: int

    @property
    def row_of_file(self) -> int:
        """Its row in the file, as crossmedia score counts."""
        return self.row_group.first_row + self.row


def place_of(index: "SampleIndex", number: int) -> GroupPlace:
    """Find group `number` of all groups, in the order of the files. Raises NotHereError."""
    left = number
    for row_group in index.row_groups:
        if 0 <= left < row_group.num_groups:
            return GroupPlace(row_group, left)
        left -= row_group.num_groups
    raise NotHereError(Problem.NO_GROUP, number, index.num_groups)


@dataclass(frozen=True)
class GroupColumns:
    """The columns of a sample group that a run reads, and which of them are pictures and behaviours."""

    opened: OpenedRun

    @cached_property
    def rules(self) -> Mapping[str, "Rule"]:
        """The rule of each column, crossed ones too."""
        from trainer.samples.columns import rules_of

        return rules_of(self.opened.schema)

    @cached_property
    def sources(self) -> Mapping[str, "Rule"]:
        """The columns of the files."""
        from trainer.samples.columns import source_columns

        return source_columns(self.rules)

    @cached_property
    def ad_image(self) -> "Field | None":
        """The field of the ads' pictures."""
        return next(self.opened.schema.of_kind("content", side="ad"), None)

    @cached_property
    def history(self) -> "Field | None":
        """The field of the behaviours' pictures."""
        fields = list(self.opened.schema.of_kind("content", side="user"))
        store = self.ad_image.store_name if self.ad_image else None
        return next((field for field in fields if field.store_name == store), fields[0] if fields else None)

    @cached_property
    def of_behaviors(self) -> tuple[str, ...]:
        """The columns of the files with one value per behaviour."""
        from trainer.samples.columns import aligned_columns

        if self.history is None:
            return ()
        found = {self.history.column_name}
        for together in aligned_columns(self.sources):
            if found & set(together):
                found |= set(together)
        more = True
        while more:  # lists aligned with those lists, and with these
            beside = {name for name, rule in self.sources.items() if rule.side == "user" and found & {*rule.lengths_of}}
            more = not beside <= found
            found |= beside
        return tuple(name for name in self.sources if name in found)

    @cached_property
    def pictures_of_behaviors(self) -> tuple[str, ...]:
        """The model's content fields of the behaviours' pictures."""
        if self.history is None:
            return ()
        return tuple(
            field.name
            for field in self.opened.trained.engine.fields
            if field.kind == "content" and field.side == "user" and field.column_name in self.of_behaviors
        )

    @cached_property
    def looks_of_ads(self) -> tuple[str, ...]:
        """The model's content fields that read the ads' pictures."""
        if self.ad_image is None:
            return ()
        column = self.ad_image.column_name
        return tuple(
            field.name
            for field in self.opened.trained.engine.fields
            if field.kind == "content" and field.side == "ad" and field.column_name == column
        )

    def read(self, number: int) -> "SampleGroup":
        """Read group `number`. Raises NotHereError, DataError."""
        from trainer.samples.columns import plain
        from trainer.samples.index import read_row_group

        index = self.opened.index
        place = place_of(index, number)
        names = list(dict.fromkeys([*self.sources, self.opened.schema.time]))
        table = read_row_group(index.storage, place.row_group, names)
        if place.row >= table.num_rows:
            from trainer.errors import DataError

            raise DataError(Problem.CHANGED, index.storage.full(place.row_group.file))
        table = plain(table.slice(place.row, 1))
        return SampleGroup(
            self, number, place, table.select([n for n in table.column_names if n in self.sources]), table
        )

    def decode(self, table: pa.Table, file: str, first_row: int) -> "DecodedGroups":
        """Decode groups as training does. Raises DataError."""
        from trainer.samples.columns import decode

        return decode(table, self.rules, self.opened.schema.label, file, first_row)

    def batch(self, groups: "DecodedGroups", chosen: slice = slice(None)) -> "Batch":
        """Make a batch of decoded groups, all their impressions."""
        from trainer.samples.index import Piece
        from trainer.samples.reader import assemble

        first, last, _ = chosen.indices(len(groups.sample_offsets) - 1)
        begin, end = (int(groups.sample_offsets[each]) for each in (first, last))
        return assemble(self.opened.schema, [Piece(groups, begin, end)], end - begin)


@dataclass(frozen=True)
class SampleGroup:
    """One sample group of a run's test samples."""

    columns: GroupColumns
    number: int
    place: GroupPlace
    table: pa.Table
    """One row with the columns that the run reads."""
    whole: pa.Table
    """The same row, with the time if the samples have it."""

    @cached_property
    def row(self) -> Row:
        """The group as a Python dict."""
        row: Row = self.table.to_pylist()[0]
        return row

    @property
    def where(self) -> str:
        """The file that the group is in."""
        index = self.columns.opened.index
        return index.storage.full(self.place.row_group.file)

    @property
    def user(self) -> str:
        """The user, as the logs name one."""
        name = self.columns.opened.schema.group
        rule = self.columns.rules[name]
        return " × ".join(self.columns.opened.texts(self.row[each] for each in (rule.crossed or (name,))))

    @cached_property
    def time_s(self) -> float | None:
        """Time of the group, in seconds since 1970; None if the samples have none."""
        from trainer.evaluation.predict import seconds_of

        name = self.columns.opened.schema.time
        if name not in self.whole.column_names:
            return None
        found = seconds_of(self.whole.column(name), name, self.where)[0].as_py()
        return None if found is None else float(found)

    @property
    def labels(self) -> list[int]:
        """Which impressions were clicked."""
        return [int(each) for each in self.row[self.columns.opened.schema.label]]

    @property
    def ads(self) -> list[str]:
        """The ads, as the logs name them."""
        name = self.columns.opened.schema.new_ad_column
        columns = [self.columns.opened.texts(self.row[each]) for each in (self.columns.rules[name].crossed or (name,))]
        return [" × ".join(values) for values in zip(*columns, strict=True)]

    @property
    def ad_pictures(self) -> list[PictureName]:
        """The picture of each ad."""
        return self._pictures(self.columns.ad_image)

    @property
    def behavior_pictures(self) -> list[PictureName]:
        """The picture of each behaviour, newest first."""
        return self._pictures(self.columns.history)

    def of_ad(self, ad: int) -> Row:
        """Return the group with only one of its ads."""
        of_ads = [name for name, rule in self.columns.sources.items() if rule.side == "ad"]
        return self.row | {name: [self.row[name][ad]] for name in of_ads}

    def without_behavior(self, row: Row, behavior: int) -> Row:
        """Remove a behaviour from a row: its picture, and all its IDs and numbers."""
        shorter = {}
        for name in self.columns.of_behaviors:
            values = row[name]
            shorter[name] = [*values[:behavior], *values[behavior + 1 :]]
        return row | shorter

    def with_pictures(self, row: Row, pictures: Sequence[PictureName]) -> Row:
        """Repeat the only ad of a row with each of these pictures, in the order given."""
        field = self.columns.ad_image
        assert field is not None
        of_ads = [name for name, rule in self.columns.sources.items() if rule.side == "ad"]
        repeated = {name: row[name] * len(pictures) for name in of_ads}
        is_text = _is_text(self.table.schema.field(field.column_name).type)
        values: list[Any] = [each.uri if is_text else each.key for each in pictures]
        return row | repeated | {field.column_name: values}

    def batch(self, rows: Sequence[Row]) -> "Batch":
        """Make a batch of groups like this one. Raises DataError."""
        table = pa.Table.from_pylist(list(rows), schema=self.table.schema)
        return self.columns.batch(self.columns.decode(table, self.where, self.place.row_of_file))

    def _pictures(self, field: "Field | None") -> list[PictureName]:
        if field is None:
            return []
        return [named(each) for each in self.row[field.column_name]]


def named(value: int | str) -> PictureName:
    """Return the name of a picture that a sample file has as a key or uri."""
    return PictureName(key_of_uri(value), value) if isinstance(value, str) else PictureName(int(value), None)


def without_pictures(batch: "Batch", fields: Sequence[str], behavior_G: NDArray[np.int64]) -> "Batch":
    """Remove the picture of behaviour `behavior_G[g]` from the history of each group g of a batch.

    The behaviour's IDs stay, also that of the picture; the list of pictures is one shorter.
    """
    changed = dict(batch.fields)
    for name in fields:
        lists = batch.fields[name]
        starts_G = np.cumsum(lists.lengths_M) - lists.lengths_M
        kept_N = np.ones(len(lists.values_N), np.bool_)
        kept_N[starts_G + behavior_G] = False
        changed[name] = replace(lists, values_N=lists.values_N[kept_N], lengths_M=lists.lengths_M - 1)
    return replace(batch, fields=changed)


def with_looks(batch: "Batch", other: "Batch", fields: Sequence[str]) -> "Batch":
    """Replace the pictures of a batch's ads by those of another batch, keeping the IDs."""
    looks = {name: other.fields[name] for name in fields}
    return replace(batch, fields={**batch.fields, **looks})


def _is_text(kind: pa.DataType) -> bool:
    while not pa.types.is_primitive(kind) and hasattr(kind, "value_type"):
        kind = kind.value_type
    return is_text(kind)
