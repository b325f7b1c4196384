"""Store in worker: features travel in the samples, E runs once per occurrence, PyTorch's DataLoader reads ahead.

The batches are those of the trainer, written to Parquet with the features in the rows: fixed-size bytes, uncompressed,
as drawn features do not shrink. `grouped`: the images that a group has seen stand in its row once; else each sample is
a row of its own. Letters of shapes as in trainer/samples/reader.py.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.train.model import Images, Model, StoredFeatures, occurrences, per_sample
from featurestore.lookup.partition import FeaturePartition
from trainer.engine.wiring import model_name
from trainer.exchange.exchange import KeyRequest
from trainer.runs.open import Run
from trainer.samples.reader import Batch, Jagged

KEPT_BATCHES = 2
"""On disk, read over and over: a batch of the paper's shape is 0.8 GB."""


@dataclass(frozen=True)
class FullBatch:
    """A batch, and of each content field the features of its values, (N, D)."""

    batch: Batch
    features: dict[str, Tensor]


class BatchFiles(Dataset[FullBatch]):
    """Batches on disk: a file of each side, one row group a batch."""

    def __init__(self, folder: Path, sides: dict[str, str], content: list[str], dim: int) -> None:
        self._folder, self._sides, self._content, self._dim = folder, sides, content, dim

    def __getitem__(self, number: int) -> FullBatch:
        pa.set_cpu_count(1)  # the workers share the cores already
        tables = {side: pq.read_table(self._folder / f"{number}.{side}.parquet") for side in ("user", "ad")}
        fields, features = {}, {}
        for name, side in self._sides.items():
            column: Any = tables[side].column(name).combine_chunks()
            lengths_M = np.diff(column.offsets.to_numpy()).astype(np.int32)
            if name in self._content:
                bits = np.frombuffer(column.values.buffers()[1], np.uint16).reshape(-1, self._dim)
                features[name] = torch.from_numpy(bits).view(torch.bfloat16)
                fields[name] = Jagged(np.empty(0, np.int64), lengths_M)
            else:
                fields[name] = Jagged(column.values.to_numpy(), lengths_M)
        ad = {name: tables["ad"].column(name).to_numpy() for name in ("group_of_sample", "label", "user_of_sample")}
        return FullBatch(
            Batch(fields, {}, ad["group_of_sample"], ad["label"], ad["user_of_sample"], len(ad["label"])), features
        )


class StoreInWorker:
    """One rank. The features that the model needs come with the batch."""

    ahead = True

    def __init__(self, run: Run, folder: Path, grouped: bool) -> None:
        assert run.partition is not None
        (service,) = run.engine.services.values()
        self.model, self._stored = Model(run, service), StoredFeatures(service)
        self._names = {field.name: model_name(field, run.config.model) for field in self.model.content}
        place = folder / ("grouped" if grouped else "plain")
        fields = run.engine.fields
        if not (place / "done").exists():
            place.mkdir(parents=True, exist_ok=True)
            for number, batch in enumerate(itertools.islice(self.model.batches(), KEPT_BATCHES)):
                whole = batch if grouped else per_sample(batch, fields)
                write_batch(whole, {f.name: f.side for f in fields}, list(self._names), run.partition, place, number)
            (place / "done").touch()
        files = BatchFiles(place, {f.name: f.side for f in fields}, list(self._names), run.partition.dim)

        # The batches on disk, again and again.
        loader: DataLoader[FullBatch] = DataLoader(
            files,
            batch_size=None,
            sampler=itertools.cycle(range(KEPT_BATCHES)),
            num_workers=torch.get_num_threads(),
            prefetch_factor=1,
        )
        self._loaded = iter(loader)

    def prepare(self) -> tuple[FullBatch, KeyRequest]:
        """Prepare the next batch, and exchange its ID keys."""
        full = next(self._loaded)
        return full, self.model.request(full.batch)

    def step(self, prepared: tuple[FullBatch, KeyRequest]) -> tuple[float, None]:
        """Train on one batch."""
        full, request = prepared
        return self.model.train_step(full.batch, request, lambda _: self._images(full)), None

    def _images(self, full: FullBatch) -> Images:
        return {
            field: occurrences(
                self._stored.embed(name, full.features[field], field), full.batch.fields[field].lengths_M
            )
            for field, name in self._names.items()
        }


def write_batch(
    batch: Batch, sides: dict[str, str], content: list[str], partition: FeaturePartition, place: Path, number: int
) -> None:
    """Write two files: the rows of the user side and those of the ad side, features in place of image keys."""
    columns: dict[str, dict[str, Any]] = {"user": {}, "ad": {}}
    for name, side in sides.items():
        jagged = batch.fields[name]
        values: Any = pa.array(jagged.values_N)
        if name in content:
            rows = pa.py_buffer(partition.lookup(jagged.values_N).features_UD.data)
            kind = pa.binary(partition.dim * partition.info.storage_dtype.itemsize)
            values = pa.FixedSizeBinaryArray.from_buffers(kind, len(jagged.values_N), [None, rows])
        offsets: Any = pa.array(np.concatenate([[0], np.cumsum(jagged.lengths_M)]).astype(np.int32))
        columns[side][name] = pa.ListArray.from_arrays(offsets, values)
    columns["ad"]["group_of_sample"] = batch.group_of_sample_B
    columns["ad"]["label"] = batch.label_B
    columns["ad"]["user_of_sample"] = batch.group_id_B
    for side, table in columns.items():
        pq.write_table(pa.table(table), place / f"{number}.{side}.parquet", compression="none", use_dictionary=False)
