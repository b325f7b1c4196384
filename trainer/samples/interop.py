"""Samples of and for other programs: rows of their tables to score, and torch Datasets of what is stored.

A table is of pandas, Arrow, numpy or torch, with an impression in each row, or a group, and without labels.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from featurestore import Codec, FeaturePartition, FeatureStore
from featurestore.published.versions import open_published
from trainer.comm import SoloComm
from trainer.errors import DataError
from trainer.samples.columns import rules_of, source_columns
from trainer.samples.index import open_index
from trainer.samples.reader import Batch, Jagged, SampleReader
from trainer.samples.survey import fill_in, measure, schema_beside
from trainer.schema import Schema


def table_of(data: Any) -> pa.Table:
    """Make an Arrow table of a DataFrame of pandas, an Arrow table, or a mapping of columns. Raises DataError."""
    if isinstance(data, pa.Table):
        return data
    try:
        if isinstance(data, pa.RecordBatch):
            return pa.Table.from_batches([data])
        if is_pandas(data):
            return pa.Table.from_pandas(data, preserve_index=False).replace_schema_metadata(None)
        if isinstance(data, Mapping):
            return pa.table({str(name): _column(values) for name, values in data.items()})
    except (pa.ArrowException, ValueError, TypeError) as failure:
        raise DataError(f"the table cannot be read: {failure}") from failure
    raise DataError(f"{type(data).__name__} is not a table; give a DataFrame of pandas, an Arrow table, or a dict")


def is_pandas(data: Any) -> bool:
    """Return whether data is a DataFrame of pandas, which is not imported for it."""
    return type(data).__module__.partition(".")[0] == "pandas" and hasattr(data, "columns")


def _column(values: Any) -> Any:
    """Make a column of a list or of an array of any library; rows of a matrix become lists."""
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    if hasattr(values, "__array__"):
        values = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
        return pa.array(list(values) if values.ndim > 1 else values)
    return pa.array(values)


def groups_of_rows(table: pa.Table, depths: Mapping[str, int]) -> pa.Table:
    """Make groups of rows: the columns of `depths`, with so many lists around their values; others are left out.

    Of a table with an impression in each row, the columns of its ad lack the list of ads: they get lists of one.
    """
    table = table.select([name for name in table.column_names if name in depths])
    table = table.cast(pa.schema([pa.field(each.name, _known(each.type)) for each in table.schema]))
    offsets = pa.array(np.arange(table.num_rows + 1), pa.int32())
    for place, field in enumerate(table.schema):
        if _depth(field.type) == depths[field.name] - 1:
            column = table.column(place).combine_chunks()
            table = table.set_column(place, field.name, pa.ListArray.from_arrays(offsets, column))
    return table


def sample_groups(table: pa.Table, schema: Schema) -> pa.Table:
    """Make sample groups of rows, see `groups_of_rows`; their labels are zeros. Raises DataError without an ad."""
    rules = {name: rule for name, rule in source_columns(rules_of(schema)).items() if name != schema.label}
    groups = groups_of_rows(table, {name: rule.depth for name, rule in rules.items()})
    of_ads = next((name for name in groups.column_names if rules[name].side == "ad"), None)
    if of_ads is None:
        raise DataError(f"the rows have no column of an ad, as {schema.new_ad_column}")
    lengths_G = groups.column(of_ads).combine_chunks().value_lengths().to_numpy(zero_copy_only=False)  # type: ignore[attr-defined]
    offsets = np.concatenate([[0], np.cumsum(lengths_G)])
    labels = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(np.zeros(offsets[-1], np.int8)))
    return groups.append_column(schema.label, labels)


def _known(kind: Any) -> pa.DataType:
    """Return a column's type; of one without a value, such as empty lists alone, it is that of IDs."""
    if _depth(kind):
        return pa.list_(_known(kind.value_type))
    return pa.int64() if pa.types.is_null(kind) else kind


def _depth(kind: Any) -> int:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return 1 + _depth(kind.value_type) if is_list else 0


Tensors = dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]]


class FeatureDataset(Dataset[tuple[int, torch.Tensor]]):
    """The images of a snapshot: key and feature, float32 (D,), in the order of the keys.

    Rows come from memory-mapped files in the cache, which are built when they are missing.
    """

    def __init__(self, store: str, version: int | str | None = None, cache_dir: str | None = None) -> None:
        self._place = store, version, cache_dir
        self._partition: FeaturePartition | None = None
        self.keys = FeatureStore.open(store).snapshot(version).keys()

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, place: int) -> tuple[int, torch.Tensor]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[tuple[int, torch.Tensor]]:
        """Read several images at once, as a DataLoader asks for them."""
        if self._partition is None:  # one for each process of a DataLoader
            url, version, cache_dir = self._place
            self._partition = FeaturePartition.load(url, cache_dir=cache_dir, version=version)
        keys_U = self.keys[np.asarray(places)]
        features_UD = Codec(self._partition.info.dtype).decode(self._partition.lookup(keys_U).features_UD)
        return list(zip(keys_U.tolist(), torch.from_numpy(features_UD), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_partition": None}


class SampleDataset(IterableDataset[Tensors]):
    """Batches of samples, as the trainer reads them; for a DataLoader with batch_size=None.

    A batch is a dict: `label` (B,), `group_of_sample` (B,), each field of numbers (M, width), and each field of IDs or
    images as (values, lengths): row m has the next `lengths[m]` of the values. M is a row for each group on the user's
    side, for each sample on the ads' side. Workers of a DataLoader have a part of each batch.
    """

    def __init__(
        self,
        samples: str = "data/samples",
        split: str = "train",
        *,
        batch_size: int = 1024,
        schema: str | None = None,
        seed: int | None = None,
        epoch: int = 0,
    ) -> None:
        """Read the footers of the samples; `seed`: their order is random in each epoch. Raises DataError."""
        comm, storage = SoloComm(), open_published(samples)
        found = schema_beside(storage, schema)
        train = open_index(comm, storage, "train", found)
        self.schema = fill_in(found, measure(comm, train, found))
        self.index = train if split == "train" else open_index(comm, storage, split, self.schema)
        self.epoch = epoch
        self._options: dict[str, Any] = {"batch_size": batch_size, "seed": seed}

    def __len__(self) -> int:
        return self._reader(0, 1).steps_per_epoch

    def __iter__(self) -> Iterator[Tensors]:
        worker = get_worker_info()
        reader = self._reader(worker.id, worker.num_workers) if worker else self._reader(0, 1)
        return map(tensors_of, reader.batches(self.epoch))

    def _reader(self, rank: int, num_ranks: int) -> SampleReader:
        return SampleReader(self.index, self.schema, rank=rank, num_ranks=num_ranks, **self._options)


def tensors_of(batch: Batch) -> Tensors:
    """Make tensors of a batch."""

    def pair(rows: Jagged) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(rows.values_N), torch.from_numpy(rows.lengths_M)

    return {
        "label": torch.from_numpy(batch.label_B),
        "group_of_sample": torch.from_numpy(batch.group_of_sample_B),
        **{name: torch.from_numpy(values) for name, values in batch.dense.items()},
        **{name: pair(rows) for name, rows in batch.fields.items()},
    }
