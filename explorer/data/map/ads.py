"""What the test samples say of ad images: impressions, clicks, category; and what a run gets wrong about them.

Letters of shapes: I different ad images, N impressions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featurestore.keys import Int64Array

if TYPE_CHECKING:
    from trainer.evaluation.predict import Predictions
    from trainer.samples.reader import RowGroup, SampleIndex
    from trainer.schema import Field, Schema

MOST_IMPRESSIONS = 2_000_000
"""Of more, row groups are left out evenly."""
_CATEGORY = "category"


@dataclass(frozen=True)
class AdImages:
    """Ad images of the test samples, keys ascending."""

    keys_I: Int64Array
    impressions_I: Int64Array
    clicks_I: Int64Array
    category_I: Sequence[str | None]
    """As the samples have it; None where they have none."""
    is_sampled: bool
    """Whether impressions were left out."""

    def at(self, keys: Int64Array) -> Int64Array:
        """Find the place of each key, -1 where it is no ad's."""
        if len(self.keys_I) == 0:
            return np.full(len(keys), -1)
        places = np.minimum(np.searchsorted(self.keys_I, keys), len(self.keys_I) - 1)
        return np.where(self.keys_I[places] == keys, places, -1)


def read_ads(index: "SampleIndex", schema: "Schema") -> AdImages | None:
    """Count the impressions of each ad image; None where the schema has none. Order of impressions, read in pieces.

    Raises DataError, SchemaError.
    """
    from trainer.evaluation.slices import ad_image_field

    image, category = ad_image_field(schema), category_field(schema)
    if image is None:
        return None
    chosen = _evenly(index.row_groups, index.num_samples)
    keys: list[Int64Array] = []
    counts: list[NDArray[np.int64]] = []
    categories: dict[int, str] = {}
    for keys_N, label_N, category_N in _columns(index, chosen, schema, image, category):
        keys_I, first_I, of_N = np.unique(keys_N, return_index=True, return_inverse=True)
        clicks_I = np.bincount(of_N, label_N, len(keys_I)).astype(np.int64)
        keys.append(keys_I)
        counts.append(np.stack([np.bincount(of_N, minlength=len(keys_I)), clicks_I], axis=1))
        if category_N is not None:
            categories |= dict(zip(keys_I.tolist(), category_N[first_I].tolist(), strict=True))
    keys_I, of_R = np.unique(np.concatenate([np.empty(0, np.int64), *keys]), return_inverse=True)
    sums_I2 = np.zeros((len(keys_I), 2), np.int64)
    if counts:
        np.add.at(sums_I2, of_R, np.concatenate(counts))
    return AdImages(
        keys_I=keys_I,
        impressions_I=sums_I2[:, 0],
        clicks_I=sums_I2[:, 1],
        category_I=[categories.get(key) for key in keys_I.tolist()],
        is_sampled=len(chosen) < len(index.row_groups),
    )


def category_field(schema: "Schema") -> "Field | None":
    """Find the field of the ad's category: an ID of side ad whose name says so; None where there is none."""
    of_ads = [field for field in schema.of_kind("id", side="ad") if not field.columns and not field.is_bucketed]
    return next((field for field in of_ads if _CATEGORY in field.name.lower()), None)


def mean_loss(predictions: "Predictions") -> tuple[Int64Array, NDArray[np.float64]]:
    """Compute the mean log loss of a run's predictions for each ad image: keys ascending (I,), losses (I,)."""
    image_N = predictions.impressions.image_N
    if image_N is None:
        return np.empty(0, np.int64), np.empty(0)
    label_N, logit_N = predictions.impressions.label_N.astype(np.float64), predictions.logit_N
    loss_N = np.logaddexp(0, logit_N) - logit_N * label_N
    keys_I, of_N = np.unique(image_N, return_inverse=True)
    return keys_I, np.bincount(of_N, loss_N, len(keys_I)) / np.bincount(of_N, minlength=len(keys_I))


def _evenly(row_groups: "Sequence[RowGroup]", num_samples: int) -> "Sequence[RowGroup]":
    every = -(-num_samples // MOST_IMPRESSIONS)
    return row_groups[::every] if every > 1 else row_groups


def _columns(
    index: "SampleIndex", row_groups: "Sequence[RowGroup]", schema: "Schema", image: "Field", category: "Field | None"
) -> Iterator[tuple[Int64Array, NDArray[np.float64], NDArray[Any] | None]]:
    """Read key, label and category of impressions, a row group at a time."""
    from trainer.samples.columns import decode, rules_of, source_columns, texts_of
    from trainer.samples.reader import read_row_groups

    names = {schema.label, image.column_name} | ({category.column_name} if category else set())
    rules = {name: rule for name, rule in rules_of(schema).items() if name in names}
    for row_group, table in read_row_groups(index.storage, row_groups, list(source_columns(rules))):
        file = index.storage.full(row_group.file)
        groups = decode(table, rules, schema.label, file, row_group.first_row)
        category_N: NDArray[Any] | None = None
        if category is not None:
            column = category.column_name
            if column in index.text_columns:
                encoded = texts_of(table, column, rules[column], file, row_group.first_row)
                category_N = np.asarray(encoded.texts_U, object)[encoded.index_N]
            else:
                category_N = groups.columns[column].values.astype(str).astype(object)
        keys_N = groups.columns[image.column_name].values
        yield keys_N, groups.columns[schema.label].values.astype(np.float64), category_N
