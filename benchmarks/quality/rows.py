"""The impressions of some samples as FuxiCTR wants them: a row each, IDs as numbers of a vocabulary, histories padded.

Letters of shapes as in trainer/samples/reader.py; L is the longest history.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.problems import Problem
from trainer.comm import SoloComm
from trainer.errors import SchemaError
from trainer.models.nets import paired_fields
from trainer.samples.index import open_index
from trainer.samples.reader import Batch, Jagged, SampleReader
from trainer.schema.fields import Field, Schema

PADDING = 0
Int = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """The part that each field plays. `items`: of the ad and of each behaviour; `rest`: all others.

    `items` and `images` are pairs, (behaviour field, ad field).
    """

    items: tuple[tuple[Field, Field], ...]
    images: tuple[tuple[Field, Field], ...]
    rest: tuple[Field, ...]

    @classmethod
    def of(cls, schema: Schema) -> "Layout":
        """Take the columns of a schema whose behaviours are described by the fields of its ads. Raises SchemaError."""
        items = tuple(paired_fields(schema.fields))
        content = {field.side: field for field in schema.of_kind("content")}
        images = ((content["user"], content["ad"]),) if len(content) == 2 else ()
        paired = {field.name for pair in (*items, *images) for field in pair}
        rest = tuple(field for field in schema.fields if field.name not in paired)
        if not items or (strange := [field.name for field in rest if field.kind == "dense"]):
            what = f"dense fields ({', '.join(strange)})" if items else "no behaviours that share a table with the ad"
            raise SchemaError(Problem.NOT_FOR_FUXICTR, what)
        return cls(items, images, rest)


@dataclass(frozen=True)
class Vocabulary:
    """Numbers of the values that training met: 1 to n; n + 1 is for all others, 0 for padding."""

    known_V: Int

    @classmethod
    def of(cls, values: Sequence[Int]) -> "Vocabulary":
        """Make a vocabulary of these values."""
        return cls(np.unique(np.concatenate(values)))

    @property
    def size(self) -> int:
        """Rows of an embedding of it."""
        return len(self.known_V) + 2

    def numbers(self, values_N: Int) -> Int:
        """Return the number of each value."""
        place_N = np.minimum(np.searchsorted(self.known_V, values_N), len(self.known_V) - 1)
        return np.where(self.known_V[place_N] == values_N, place_N + 1, len(self.known_V) + 1)


def read(samples: str, split: str, schema: Schema, days: Sequence[str] | None) -> Batch:
    """Read all samples of a split, or of some days, in the order of the files. Raises DataError, SchemaError."""
    index = open_index(SoloComm(), samples, split, schema, days)
    return next(SampleReader(index, schema, batch_size=index.num_samples).batches())


def vocabularies(batch: Batch, fields: Sequence[Field]) -> dict[str, Vocabulary]:
    """Make a vocabulary for each table of the fields."""
    values: dict[str, list[Int]] = {}
    for field in fields:
        values.setdefault(field.table_name, []).append(batch.fields[field.name].values_N)
    return {table: Vocabulary.of(each) for table, each in values.items()}


def write_pretrained(folder: Path, name: str, keys_N: Int, values_ND: NDArray[np.float32]) -> None:
    """Write vectors as FuxiCTR reads pretrained embeddings: features.npz, and the number of each key, from 1 on."""
    np.savez(folder / "features.npz", key=keys_N, value=values_ND)
    numbers = {str(key): 1 + place for place, key in enumerate(keys_N.tolist())}
    # FuxiCTR looks at the second entry to learn the type of the keys.
    (folder / "feature_vocab.json").write_text(json.dumps({name: numbers, "label": {}}))


def padded(jagged: Jagged) -> Int:
    """Lay out rows of equal length (M, L), filled up with PADDING."""
    lengths_M = jagged.lengths_M.astype(np.int64)
    padded_ML = np.full((len(lengths_M), max(1, int(lengths_M.max(initial=0)))), PADDING, np.int64)
    padded_ML[np.arange(padded_ML.shape[1]) < lengths_M[:, None]] = jagged.values_N
    return padded_ML


@dataclass(frozen=True)
class Rows:
    """B impressions. `history_GL` and `user_G`: of each group, for `group_B` to choose; `ad_B`: of each impression."""

    ad_B: Mapping[str, Int]
    history_GL: Mapping[str, Int]
    user_G: Mapping[str, Int]
    length_G: Int
    group_B: Int
    label_B: NDArray[np.float32]
    user_id_B: Int

    @classmethod
    def of(cls, batch: Batch, layout: Layout, known: Mapping[str, Vocabulary]) -> "Rows":
        """Make the rows of a batch; fields of several values are padded, content fields numbered by their store."""

        def numbered(field: Field) -> Int:
            jagged = batch.fields[field.name]
            name = field.store_name if field.kind == "content" else field.table_name
            values = Jagged(known[name].numbers(jagged.values_N), jagged.lengths_M)
            many = field.kind == "multi_id" or (field.kind == "content" and field.side == "user")
            return padded(values) if many else values.values_N

        pairs = (*layout.items, *(pair for pair in layout.images if pair[1].store_name in known))
        rest = {field.name: field for field in layout.rest}
        return cls(
            ad_B={ad.name: numbered(ad) for _, ad in pairs}
            | {name: numbered(field) for name, field in rest.items() if field.side == "ad"},
            history_GL={ad.name: numbered(behavior) for behavior, ad in pairs},
            user_G={name: numbered(field) for name, field in rest.items() if field.side == "user"},
            length_G=batch.fields[layout.items[0][0].name].lengths_M.astype(np.int64),
            group_B=batch.group_of_sample_B,
            label_B=batch.label_B,
            user_id_B=batch.group_id_B,
        )
