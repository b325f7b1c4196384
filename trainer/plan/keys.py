"""Samples drawn as the trainer draws them: how many keys a global batch has, and each rank and owner of it."""

import time
from dataclasses import dataclass, replace

import numpy as np

from featurestore import FeatureStore
from featurestore.keys import owner_of, shard_of
from featurestore.snapshot import Snapshot
from trainer.comm import SoloComm
from trainer.config.config import Config
from trainer.engine.wiring import model_name
from trainer.errors import ConfigError
from trainer.exchange.routing import Int64
from trainer.models.layers import used_fields
from trainer.plan.cost import BatchCounts, KeyCounts
from trainer.runs.open import train_reader
from trainer.runs.stores import store_places
from trainer.samples.index import SampleIndex, open_index
from trainer.samples.reader import Batch, SampleReader
from trainer.samples.statistics import fill_in, measure
from trainer.schema import Schema, load_schema

_DRAWN_BATCHES, _MOST_COUNTED = 4, 8
_LEAST_DRAWN, _MOST_DRAWN = 100_000, 1_000_000
_MEASURED_ROW_GROUPS = 32  # for the statistics of numbers: their costs are asked for, and not their figures


@dataclass(frozen=True)
class DrawnSamples:
    """Many samples in the order in which an epoch has them, as one batch, and the fields of each source.

    Fields of one source (one E over a store, one ID table) share its keys: a key in two of them is asked for once.
    """

    batch: Batch
    sources: tuple[tuple[str, ...], ...]
    user_fields: frozenset[str]
    num_shards: int

    @property
    def num_samples(self) -> int:
        """Count the samples."""
        return self.batch.num_samples

    def keys_of(self, span: range) -> list[Int64]:
        """Return the keys of each source in samples `span`, with repetitions; a cut group has its user fields."""
        return [np.concatenate([self._values(name, span) for name in names]) for names in self.sources]

    def keys(self, samples: int, ranks: int) -> KeyCounts:
        """Count the keys of global batches that are cut into the slices of `ranks` ranks, mean over the batches."""
        count = min(_MOST_COUNTED, self.num_samples // samples)  # spread evenly, none overlaps another
        starts = [(self.num_samples - samples) * number // max(1, count - 1) for number in range(count)]
        found = np.array([self._of_batch(range(start, start + samples), ranks) for start in starts]).mean(axis=0)
        return KeyCounts(*(float(each) for each in found))

    def _of_batch(self, span: range, ranks: int) -> tuple[float, float, float]:
        """Count the keys that a rank asks for, unique keys, and those of the busiest owner."""
        asked, owned_P = 0, np.zeros(ranks, np.int64)
        for rank in range(ranks):
            part = range(span.start + len(span) * rank // ranks, span.start + len(span) * (rank + 1) // ranks)
            asked += sum(len(np.unique(keys_N)) for keys_N in self.keys_of(part)) if part else 0
        for keys_N in self.keys_of(span):
            owners_U = owner_of(shard_of(np.unique(keys_N), self.num_shards), ranks)
            owned_P += np.bincount(owners_U, minlength=ranks)
        return asked / ranks, float(owned_P.sum()), float(owned_P.max())

    def _values(self, name: str, span: range) -> Int64:
        jagged, group_B = self.batch.fields[name], self.batch.group_of_sample_B
        of_user = name in self.user_fields
        rows = range(int(group_B[span.start]), int(group_B[span.stop - 1]) + 1) if of_user else span
        ends_M = np.cumsum(jagged.lengths_M, dtype=np.int64)
        first = int(ends_M[rows.start]) - int(jagged.lengths_M[rows.start])
        return jagged.values_N[first : int(ends_M[rows.stop - 1])]


@dataclass(frozen=True)
class SampledKeys:
    """The samples and the store of a configuration, and what batches drawn from them say."""

    config: Config
    schema: Schema
    index: SampleIndex
    snapshot: Snapshot
    images: DrawnSamples
    ids: DrawnSamples
    read_s: float
    """Per sample decoded, from Parquet to a batch."""

    def counts(self, size: int, ranks: int) -> BatchCounts:
        """Count the keys of a global batch of `size` samples on `ranks`, and what the rank decodes that has most to."""
        reader = train_reader(self.config.changed(data={"global_batch_size": size}), self.index, self.schema)
        decoded = size / ranks * max(reader.decode_shares(ranks))
        return BatchCounts(size, ranks, decoded, self.images.keys(size, ranks), self.ids.keys(size, ranks))


def sample(config: Config, largest: int) -> SampledKeys:
    """Draw batches of up to `largest` samples as the trainer would.

    Raises what opening samples and store raises, and ConfigError without images or with too few samples.
    """
    data, schema = config.data, load_schema(config.data.schema_file)
    places = store_places(config, schema)
    if not places:
        raise ConfigError("model.images=none: a plan is about training with images; set it to ad, behavior or both")
    if len(places) > 1:
        raise ConfigError(
            f"a plan is made for one feature store, and the schema's content fields name {len(places)} "
            f"({', '.join(place.name for place in places)}); give it a schema with the largest one alone"
        )
    index = open_index(SoloComm(), data.samples, "train", schema, data.train_days)
    if largest > index.num_samples:
        raise ConfigError(
            f"a global batch of {largest:,} samples is larger than all {index.num_samples:,} training samples, "
            f"in which its keys are counted; give --global-batch-size of at most {index.num_samples}, or more samples"
        )
    few = replace(index, row_groups=index.row_groups[:_MEASURED_ROW_GROUPS])
    schema = fill_in(schema, measure(SoloComm(), few, schema))
    snapshot = FeatureStore.open(data.store).snapshot(data.store_version)
    total = min(index.num_samples, max(_LEAST_DRAWN, min(_MOST_DRAWN, _DRAWN_BATCHES * largest), largest))
    seed, window = (config.train.seed, data.shuffle_window_groups) if data.shuffle else (None, 1)
    reader = SampleReader(index, schema, batch_size=total, seed=seed, window_groups=window)
    start_s = time.perf_counter()
    batch = next(reader.batches())
    read_s = (time.perf_counter() - start_s) / reader.num_decoded
    of_user = frozenset(field.name for field in schema.fields if field.side == "user")

    def drawn(source_of: dict[str, str], shards: int) -> DrawnSamples:
        names = [[f for f, s in source_of.items() if s == source] for source in dict.fromkeys(source_of.values())]
        return DrawnSamples(batch, tuple(tuple(each) for each in names), of_user, shards)

    fields = used_fields(schema, config.model)
    content = {f.name: model_name(f, config.model) for f in fields if f.kind == "content"}
    images = drawn(content, snapshot.info.num_shards)
    ids = drawn({f.name: f.table_name for f in fields if f.is_id}, config.model.table_shards)
    return SampledKeys(config, schema, index, snapshot, images, ids, read_s)
