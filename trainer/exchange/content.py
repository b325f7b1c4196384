"""The source of visual vectors: E over the features of this rank's partition. Letters of shapes as in exchange.py."""

from dataclasses import dataclass

from torch import Tensor

from featurestore.keys import owner_of, shard_of
from featurestore.lookup.embedding import EmbeddingService, Gathered
from trainer.exchange.routing import Int64, unique
from trainer.stages import Kind


@dataclass
class ContentRequest:
    """Gathered features of the unique keys whose vectors E makes now: all of them, unless `reuse.ReusingSource`."""

    gathered: Gathered
    inverse_R: Int64
    num_unique: int

    @property
    def num_computed(self) -> int:
        """Count the keys whose vectors E makes now."""
        return len(self.gathered.features_QD)


class ContentSource:
    """A source of visual vectors: one E of an embedding service."""

    def __init__(self, service: EmbeddingService, model: str, num_ranks: int) -> None:
        self._service, self._model, self._num_ranks = service, model, num_ranks
        self._num_shards = service.partition.info.num_shards
        self.width = service.width(model)

    def owner_of(self, keys_U: Int64) -> Int64:
        return owner_of(shard_of(keys_U, self._num_shards), self._num_ranks)

    def places(self, keys_Q: Int64) -> Int64:
        """Return the row of each key in the partition, -1 for one without a feature."""
        return self._service.partition.places(keys_Q)

    def serve(self, keys_R: Int64, kind: Kind) -> ContentRequest:
        keys_Q, inverse_R = unique(keys_R)
        return ContentRequest(self._service.gather(keys_Q), inverse_R, len(keys_Q))

    def expect(self, served: ContentRequest) -> None:
        """Do nothing: the features are gathered already."""

    def vectors(self, served: ContentRequest) -> Tensor:
        return self._service.embed(self._model, served.gathered)

    def release(self, served: ContentRequest) -> None:
        self._service.release(served.gathered)
