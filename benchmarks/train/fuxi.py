"""The same model with FuxiCTR's own PretrainedEmbedding, once per occurrence, in the place of our image path.

Runs in the environment that tools/install_for.sh makes for FuxiCTR. Its layer holds the features of all images of the
store in float32, frozen, and one linear layer from their width to the visual width, without a hidden layer. Letters of
shapes as in trainer/samples/reader.py.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fuxictr.pytorch.layers.embeddings.pretrained_embedding import PretrainedEmbedding

from benchmarks.quality.rows import write_pretrained
from benchmarks.train.rivals import Images, Model, occurrences, per_sample
from featurestore import FeatureStore, to_float32
from featurestore.keys import Int64Array
from featurestore.lookup.partition import FeaturePartition
from trainer.exchange.exchange import KeyRequest
from trainer.runs.open import Run
from trainer.samples.reader import Batch


class FuxiCtr:
    """One rank, on the trainer's batches, with a row for each sample, as FuxiCTR has it; `grouped`: for each group."""

    ahead = True

    def __init__(self, run: Run, grouped: bool) -> None:
        (partition,) = run.partitions.values()
        self._grouped, self._fields = grouped, run.engine.fields
        self._keys = FeatureStore.open(run.config.data.store).snapshot(partition.snapshot_version).keys()
        self._layer = pretrained_layer(partition, self._keys, run.config.model.visual_width)
        self.model = Model(run, self._layer)
        self._batches = self.model.batches()

    def prepare(self) -> tuple[Batch, KeyRequest]:
        """Prepare the next batch, with places in the layer instead of image keys, and exchange its ID keys."""
        batch = next(self._batches)
        fields = dict(batch.fields)
        for name in (field.name for field in self.model.content):
            places_N = 1 + np.searchsorted(self._keys, fields[name].values_N)
            fields[name] = replace(fields[name], values_N=places_N)
        batch = replace(batch, fields=fields)
        if not self._grouped:
            batch = per_sample(batch, self._fields)
        return batch, self.model.request(batch)

    def step(self, prepared: tuple[Batch, KeyRequest]) -> tuple[float, None]:
        """Train on one batch."""
        batch, request = prepared
        return self.model.train_step(batch, request, self._images), None

    def _images(self, batch: Batch) -> Images:
        return {
            field.name: occurrences(self._layer(torch.from_numpy(values.values_N)), values.lengths_M)
            for field in self.model.content
            for values in (batch.fields[field.name],)
        }


def pretrained_layer(partition: FeaturePartition, keys_N: Int64Array, width: int) -> torch.nn.Module:
    """Make FuxiCTR's layer of the features of `keys_N` at 1, 2, …; 0 is its padding and N + 1 what it does not know."""
    values_ND = to_float32(partition.lookup(keys_N).features_UD, partition.info.dtype)
    with tempfile.TemporaryDirectory() as folder:
        write_pretrained(Path(folder), "image", keys_N, values_ND)
        specification = {"vocab_size": len(keys_N) + 2, "oov_idx": len(keys_N) + 1, "freeze_emb": True}
        layer: torch.nn.Module = PretrainedEmbedding(
            "image", specification, f"{folder}/features.npz", f"{folder}/feature_vocab.json", width, partition.dim
        )
    return layer
