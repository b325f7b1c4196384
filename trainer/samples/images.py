"""Images in samples: how often each occurs, which of them a feature store lacks, and their names.

Letters of shapes: U distinct keys of images, P ranks. Uses are rows of three numbers, (U, 3): the key, the impressions
and the behaviours that name it; distinct keys, ascending.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from featurestore.errors import StorageError
from featurestore.keys import NO_IMAGE, owner_of, shard_of
from featurestore.lookup.partition import FeaturePartition
from featurestore.published.versions import open_published
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from trainer.comm import Comm, SoloComm
from trainer.errors import DataError, SchemaError
from trainer.samples.columns import SPLITS, Rule, rules_of, sample_files
from trainer.samples.index import RowGroup, SampleIndex, open_index, read_texts, read_values
from trainer.schema import DEFAULT_STORE, Field, Schema, load_schema
from trainer.schema.fields import IMAGES_FILE, SCHEMA_FILE

_HELD = 1 << 20  # uses that wait to be merged
_SHOWN = 3

Uses = NDArray[np.int64]


@dataclass(frozen=True)
class LackingImages:
    """Images in samples that a store lacks, over all ranks; sums over keys, so an ad with two of them counts twice.

    `without`: impressions that name no image at all, which are among `impressions`; `examples`: keys of images that
    many impressions name. `of`: all impressions of the samples.
    """

    images: int
    impressions: int
    behaviors: int
    without: int
    of: int
    examples: tuple[int, ...]


def merged(parts: Sequence[Uses]) -> Uses:
    """Sum the uses of equal keys."""
    rows = np.concatenate([np.empty((0, 3), np.int64), *parts])
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    starts_U = np.flatnonzero(np.diff(rows[:, 0], prepend=rows[0, 0] - 1) if len(rows) else rows[:, 0])
    counts_U2 = np.add.reduceat(rows[:, 1:], starts_U) if len(rows) else rows[:, 1:]
    return np.column_stack([rows[starts_U, 0], counts_U2])


def uses_of(
    index: SampleIndex, row_groups: Iterable[RowGroup], rules: dict[str, Rule], fields: Sequence[Field]
) -> Uses:
    """Count the uses of the images of these content fields.

    Reads their columns alone, one row group after the other, and holds 24 bytes for each distinct image, twice while
    they are merged. Raises DataError.
    """
    sides = {field.column_name: field.side for field in fields}
    total, waiting, count = merged([]), list[Uses](), 0
    for values in read_values(index, row_groups, {column: rules[column] for column in sides}):
        for column, side in sides.items():
            keys_U, counts_U = np.unique(values[column], return_counts=True)
            by_side = [counts_U * (side == each) for each in ("ad", "user")]
            waiting.append(np.column_stack([keys_U, *by_side]))
            count += len(keys_U)
        if count > max(_HELD, len(total)):
            total, waiting, count = merged([total, *waiting]), [], 0
    return merged([total, *waiting])


def lacking(
    comm: Comm, indexes: Sequence[SampleIndex], schema: Schema, fields: Sequence[Field], partition: FeaturePartition
) -> LackingImages:
    """Count the images that the samples name in these fields of one store, and the store lacks; every rank calls it.

    Each rank reads every P-th row group, then asks the owner of each key once. Raises DataError on all ranks together.
    """
    rules = rules_of(schema)
    with comm.agreed():
        own = merged([uses_of(each, each.row_groups[comm.rank :: comm.size], rules, fields) for each in indexes])
    owner_U = owner_of(shard_of(own[:, 0], partition.info.num_shards), comm.size)
    splits_P = torch.from_numpy(np.bincount(owner_U, minlength=comm.size).astype(np.int32))
    asked = torch.from_numpy(own[np.argsort(owner_U, kind="stable")])
    received, _ = comm.alltoall(asked, splits_P, name="image_uses")
    served = merged([received.numpy()])
    lacks = served[~partition.contains(served[:, 0])] if len(served) else served
    is_none_U = lacks[:, 0] == NO_IMAGE
    named = lacks[~is_none_U]
    sums = [len(named), *lacks[:, 1:].sum(0).tolist(), int(lacks[is_none_U, 1].sum())]
    images, impressions, behaviors, without = comm.allreduce_sum_(torch.tensor(sums), name="image_uses.sums").tolist()
    own_examples = named[np.argsort(-named[:, 1], kind="stable")][:_SHOWN, :2].tolist()
    every = comm.allgather_object(own_examples, name="image_uses.examples")
    examples = sorted(itertools.chain.from_iterable(every), key=lambda use: (-use[1], use[0]))[:_SHOWN]
    of = sum(each.num_samples for each in indexes)
    return LackingImages(images, impressions, behaviors, without, of, tuple(key for key, _ in examples))


def names_of(
    indexes: Sequence[SampleIndex], rules: dict[str, Rule], fields: Sequence[Field], keys_U: NDArray[np.int64]
) -> dict[int, str]:
    """Find the names of images: in the samples' images.parquet, else in the samples, if they have texts.

    Images of samples that were made with keys have no name. Raises DataError.
    """
    found = dict(_listed(indexes[0].storage, keys_U))
    for index in indexes:
        columns = {field.column_name: rules[field.column_name] for field in fields}
        texts = {column: rule for column, rule in columns.items() if column in index.text_columns}
        if not texts or len(found) == len(keys_U):
            continue
        for encoded in read_texts(index, index.row_groups, texts):
            for place in np.flatnonzero(np.isin(encoded.ids_U, keys_U)).tolist():
                found[int(encoded.ids_U[place])] = encoded.texts_U[place]
    return found


def _listed(storage: Storage, keys_U: NDArray[np.int64]) -> Iterator[tuple[int, str]]:
    """Read the names of these keys in images.parquet, where it is there, one row group after the other."""
    if IMAGES_FILE not in storage.list():
        return
    wanted = pa.array(keys_U)
    try:
        with pq.ParquetFile(storage.open_input(IMAGES_FILE), page_checksum_verification=True) as file:
            for number in range(file.num_row_groups):
                table = file.read_row_group(number)
                table = table.filter(pc.is_in(table.column("key"), value_set=wanted))
                names: Any = table.column("uri").cast(pa.binary()).to_pylist()
                texts = (name.decode(errors="replace") for name in names)
                yield from zip(table.column("key").to_pylist(), texts, strict=True)
    except (pa.ArrowException, KeyError, OSError, StorageError) as failure:
        where = storage.full(IMAGES_FILE)
        raise DataError(f"{where} cannot be read: {str(failure).strip()}; make the samples again") from failure


def list_missing(samples: str, store: str, schema_file: str | None = None, name: str = DEFAULT_STORE) -> pa.Table:
    """List the images that all samples name in the fields of a store, and its newest snapshot lacks.

    Columns image (its name, or its key where none is known), impressions, behaviors and why; ordered by impressions.
    Raises DataError, SchemaError, FeatureStoreError.
    """
    storage = open_published(samples)
    own = storage.full(SCHEMA_FILE) if SCHEMA_FILE in storage.list() else None
    schema = load_schema(schema_file or own)
    rules = rules_of(schema)
    fields = [field for field in schema.of_kind("content") if field.store_name == name]
    if not fields:
        known = sorted({field.store_name for field in schema.of_kind("content")})
        raise SchemaError(f"no content field of the schema names store {name}, only {', '.join(known) or 'none'}")
    opened = FeatureStore.open(store)
    splits = [split for split in SPLITS if sample_files(storage, split)]
    indexes = [open_index(SoloComm(), storage, split, schema) for split in splits or SPLITS[:1]]
    uses = merged([uses_of(each, each.row_groups, rules, fields) for each in indexes])
    uses = uses[~opened.snapshot().contains(uses[:, 0])]
    uses = uses[np.lexsort([uses[:, 0], -uses[:, 2], -uses[:, 1]])]
    bad = {row.key: row for row in opened.quarantine_rows()}
    names = {key: row.uri for key, row in bad.items()} | {NO_IMAGE: ""}
    names |= names_of(indexes, rules, fields, uses[:, 0])
    why = {key: f"quarantined: {row.reason}" for key, row in bad.items()} | {NO_IMAGE: "the logs name no image"}
    keys = uses[:, 0].tolist()
    return pa.table(
        {
            "image": [names.get(key, str(key)) for key in keys],
            "impressions": pa.array(uses[:, 1]),
            "behaviors": pa.array(uses[:, 2]),
            "why": [why.get(key, "not in the store") for key in keys],
        }
    )
