"""The same model with FuxiCTR's own PretrainedEmbedding, once per occurrence, in the place of our image path.

Runs in the environment that tools/install.sh makes for FuxiCTR. Its layer holds the features of all images that the
batches have, in float32, and one linear layer from their width to the visual width, without a hidden layer. Letters of
shapes as in trainer/batch.py.
"""

import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from fuxictr.pytorch.layers.embeddings.pretrained_embedding import PretrainedEmbedding
from torch import Tensor

from benchmarks.train.model import Images, Model, occurrences, per_sample
from featurestore import to_float32
from featurestore.partition import FeaturePartition
from trainer.batch import Batch
from trainer.exchange import Request
from trainer.routing import Int64
from trainer.run import Run


class FuxiCtr:
    """One rank, over the images of the first `num_batches` batches, which it trains on again and again."""

    ahead = True

    def __init__(self, run: Run, num_batches: int) -> None:
        assert run.partition is not None
        fields = run.engine.fields
        content = [field.name for field in fields if field.kind == "content"]
        batches = [per_sample(batch, fields) for batch in itertools.islice(run.train_reader.batches(0), num_batches)]
        self._keys = np.unique(np.concatenate([batch.fields[name].values_N for batch in batches for name in content]))
        self._layer = pretrained_layer(run.partition, self._keys, run.config.model.visual_width)
        self.model = Model(run, self._layer)
        self._batches = itertools.cycle(batches)

    def prepare(self) -> tuple[Batch, dict[str, Tensor], Request]:
        """The next batch, which is in memory, where its images stand in the layer, and the exchange of its ID keys."""
        batch = next(self._batches)
        index_of_field = {
            field.name: torch.from_numpy(1 + np.searchsorted(self._keys, batch.fields[field.name].values_N))
            for field in self.model.content
        }
        return batch, index_of_field, self.model.request(batch)

    def step(self, prepared: tuple[Batch, dict[str, Tensor], Request]) -> tuple[float, None]:
        """Trains on one batch."""
        batch, index_of_field, request = prepared
        return self.model.train_step(batch, request, lambda _: self._images(batch, index_of_field)), None

    def _images(self, batch: Batch, index_of_field: dict[str, Tensor]) -> Images:
        return {
            name: occurrences(self._layer(index_N), batch.fields[name].lengths_M)
            for name, index_N in index_of_field.items()
        }


def pretrained_layer(partition: FeaturePartition, keys_N: Int64, width: int) -> torch.nn.Module:
    """FuxiCTR's layer with the features of `keys_N` at 1, 2, …; 0 is its padding and N + 1 what it does not know."""
    places = {str(key): 1 + place for place, key in enumerate(keys_N.tolist())}
    with tempfile.TemporaryDirectory() as folder:
        features, vocabulary = Path(folder) / "features.npz", Path(folder) / "vocabulary.json"
        np.savez(features, key=keys_N, value=to_float32(partition.lookup(keys_N).features_UD, partition.dtype))
        # It looks at the second entry to learn the type of the keys.
        vocabulary.write_text(json.dumps({"image": places, "label": {}}))
        specification = {"vocab_size": len(keys_N) + 2, "oov_idx": len(keys_N) + 1, "freeze_emb": True}
        layer: torch.nn.Module = PretrainedEmbedding(
            "image", specification, str(features), str(vocabulary), width, partition.dim
        )
    return layer
