"""The question to a plan, and what the samples and the store of a configuration say to it."""

import time
from dataclasses import dataclass

import numpy as np

from featurestore import FeatureStore
from featurestore.snapshot import Snapshot
from trainer.comm import SoloComm
from trainer.config.config import Config
from trainer.engine.wiring import model_name, table_shapes
from trainer.errors import ConfigError
from trainer.exchange.routing import Int64
from trainer.models.fields import used_fields
from trainer.plan.cost import BatchCounts, StageRate
from trainer.plan.draws import DrawnSamples, KeyPopulation, population
from trainer.runs.known_statistics import with_rough_statistics
from trainer.runs.open import train_reader
from trainer.runs.stores import store_places
from trainer.samples.reader import SampleIndex, SampleReader, open_index
from trainer.schema import Schema, load_schema

_DRAWN_BATCHES = 4
_LEAST_DRAWN, _MOST_DRAWN = 100_000, 1_000_000
LARGEST_MEASURED = 3_000
"""Samples of the batches on which this machine is measured, at most."""


@dataclass(frozen=True)
class PlanQuestion:
    """The ranks, batch and network of a plan. `per_rank`: the batch size is each rank's, not of all together."""

    ranks: tuple[int, ...]
    batch_size: int
    per_rank: bool
    ranks_per_machine: int
    link_bytes_per_s: float
    latency_s: float
    samples_per_day: int | None = None

    def global_size(self, ranks: int) -> int:
        """Return the samples of one step of `ranks` ranks."""
        return self.batch_size * ranks if self.per_rank else self.batch_size

    def sizes(self, ranks: int) -> tuple[int, int]:
        """Return the samples of one rank, and of all of them."""
        size = self.global_size(ranks)
        return max(1, size // ranks), size

    def check(self) -> None:
        """Raise ConfigError where ranks would be without samples."""
        for count in self.ranks:
            if self.global_size(count) < count:
                raise ConfigError(
                    f"a global batch of {self.batch_size} samples leaves some of {count} ranks without any; "
                    f"give --global-batch-size of at least {count}, or --samples-per-rank"
                )


def numbers(text: str) -> tuple[int, ...]:
    """Parse numbers of ranks, ascending. Raises ConfigError."""
    found = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(found) < 1:
        raise ConfigError(f"--ranks {text}: write numbers from 1 on with commas between them, as 8,20,40")
    return tuple(sorted(set(found)))


@dataclass(frozen=True)
class SampledKeys:
    """The samples and the store of a configuration, and what batches drawn from them say."""

    schema: Schema
    index: SampleIndex
    snapshot: Snapshot
    images: KeyPopulation
    ids: KeyPopulation
    id_vector_floats: float
    image_keys_U: Int64
    """Keys of the first batches, for a store in the place of one too large."""
    read: StageRate
    """Per sample decoded, from Parquet to a batch."""
    config: Config

    def counts(self, size: int, ranks: int) -> BatchCounts:
        """Count the keys of a global batch of `size` samples on `ranks`, and what the rank decodes that has most to."""
        reader = train_reader(self.config.changed(data={"global_batch_size": size}), self.index, self.schema)
        decoded = size / ranks * max(reader.decode_shares(ranks))
        return BatchCounts(size, ranks, decoded, self.images.keys(size, ranks), self.ids.keys(size, ranks))


def sample(config: Config, question: PlanQuestion) -> SampledKeys:
    """Draw batches as the trainer would. Raises what opening samples and store raises, ConfigError without images."""
    data = config.data
    schema = load_schema(data.schema_file)
    places = store_places(config, schema)
    if not places:
        raise ConfigError("model.images=none: a plan is about training with images; set it to ad, behavior or both")
    if len(places) > 1:
        raise ConfigError(
            f"a plan is made for one feature store, and the schema's content fields name {len(places)} "
            f"({', '.join(place.name for place in places)}); give it a schema with the largest one alone"
        )
    fields = used_fields(schema, config.model)
    index = open_index(SoloComm(), data.samples, "train", schema, data.train_days)
    schema = with_rough_statistics(SoloComm(), index, schema)
    snapshot = FeatureStore.open(data.store).snapshot(data.store_version)
    sizes = sorted({size for count in (1, *question.ranks) for size in question.sizes(count)})
    total = min(index.num_samples, max(_LEAST_DRAWN, min(_MOST_DRAWN, _DRAWN_BATCHES * sizes[-1]), sizes[-1]))
    seed, window = (config.train.seed, data.shuffle_window_groups) if data.shuffle else (None, 1)
    reader = SampleReader(index, schema, batch_size=total, seed=seed, window_groups=window)
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    batch = next(reader.batches())
    read_s, read_cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    of_user = frozenset(field.name for field in schema.fields if field.side == "user")

    def drawn(source_of: dict[str, str], shards: int) -> DrawnSamples:
        names = [[f for f, s in source_of.items() if s == source] for source in dict.fromkeys(source_of.values())]
        return DrawnSamples(batch, tuple(tuple(each) for each in names), of_user, shards)

    content = {f.name: model_name(f, config.model) for f in fields if f.kind == "content"}
    images = drawn(content, snapshot.info.num_shards)
    shapes = {shape.name: shape for shape in table_shapes(fields, config.model)}
    id_fields = {f.name: f.table_name for f in fields if f.is_id}
    ids = drawn(id_fields, config.model.table_shards)
    unique_T = [len(np.unique(keys_N)) for keys_N in ids.keys_of(range(min(total, sizes[-1])))]
    widths_T = [shapes[name].width for name in dict.fromkeys(id_fields.values())]
    first = images.keys_of(range(min(total, 16 * LARGEST_MEASURED)))
    return SampledKeys(
        schema=schema,
        index=index,
        snapshot=snapshot,
        images=population(images, sizes, float(snapshot.num_rows * len(set(content.values())))),
        ids=population(ids, sizes, float("inf")),
        id_vector_floats=float(np.average(widths_T, weights=unique_T)) if sum(unique_T) else 0.0,
        image_keys_U=np.unique(np.concatenate(first)),
        read=StageRate(0.0, read_s / reader.num_decoded, read_cpu_s / read_s),
        config=config,
    )
