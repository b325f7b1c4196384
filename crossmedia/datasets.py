"""torch Datasets of stored data: the images of a snapshot, and batches of samples."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from featurestore import Codec, FeaturePartition, FeatureStore
from featurestore.published.versions import open_published
from trainer.comm import SoloComm
from trainer.samples.index import open_index
from trainer.samples.reader import Batch, Jagged, SampleReader
from trainer.samples.survey import fill_in, measure, schema_beside

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
