"""The data of the variants: feature stores, samples, who gets which of them, and batches."""

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore import ExtractorSpec, FeatureRows, FeatureStore, StoreInfo
from featurestore.keys import shard_of
from featurestore.upkeep.remake import remake
from tests.trainer.samples.reading import hashed
from tests.variants import DIM, NUM_SHARDS, SEED, TEXT_DIM, Variant
from trainer.samples.columns import bucket_ids, decode, dense_values, rules_of
from trainer.samples.index import Piece
from trainer.samples.reader import Batch, Jagged, assemble
from trainer.schema.fields import Schema

WORDS = {hashed(word): word for word in (f"{what} ü{n}" for what in ("user", "item") for n in range(-15, 30))}


@dataclass(frozen=True)
class Sample:
    """One impression; samples of one session share `session` and its user side."""

    session: int
    user: int
    age: float
    behavior_item: tuple[int, ...]
    behavior_image: tuple[int, ...]
    ad_item: int
    ad_image: int
    ad_price: tuple[float, float]
    label: int

    @property
    def item_weight(self) -> tuple[float, ...]:
        """Of each behaviour: negative, zero and positive ones."""
        return tuple(item % 5 / 2 - 0.5 for item in self.behavior_item)

    @property
    def behavior_age(self) -> tuple[float, ...]:
        """Seconds, less than one and up to a day."""
        return tuple((item + 15) ** 3.4 / 3 + place for place, item in enumerate(self.behavior_item))

    @property
    def income(self) -> float:
        """Of the user, one for each session; every fourth is missing."""
        return 30 * 1.7 ** (self.session % 9) if self.session % 4 else math.nan

    @property
    def ad_rate(self) -> float:
        """Of the ad, missing for a fifth of the items."""
        return 3 * self.ad_price[1] + 7 if self.ad_item % 5 else math.nan

    @property
    def ad_weight(self) -> float:
        """Of the ad's item."""
        return 0.25 + self.ad_item % 3


def features() -> dict[int, np.ndarray]:
    """Key -> feature; like fc6 after ReLU: not centred, many zeros."""
    draw = np.random.default_rng(SEED)
    keys = draw.integers(-(2**63), 2**63 - 1, 400)
    values = np.maximum(draw.normal(0.5, 1.0, (400, DIM)), 0).astype(np.float32)
    return {int(key): value for key, value in zip(keys, values, strict=True)}


def texts() -> dict[int, np.ndarray]:
    """Key -> feature of the text that belongs to the image of that key."""
    draw = np.random.default_rng(SEED + 2)
    return {key: draw.normal(1.0, 2.0, TEXT_DIM).astype(np.float32) for key in features()}


def keys_in_one_shard() -> list[int]:
    """Keys of images in shard 0, which rank 0 owns whatever the number of ranks."""
    keys = np.array(list(features()))
    return keys[shard_of(keys, NUM_SHARDS) == 0].tolist()


def make_store(path: Path) -> None:
    """A store of `features`, and beside it one of their components, one of `texts`, and samples."""
    images = _make(str(path), "images", features())
    remake(images, f"{path}-compact", dims=6, dtype="bfloat16")
    _make(f"{path}-texts", "texts", texts())
    _write_samples(Path(f"{path}-samples"))


def _write_samples(folder: Path) -> None:
    """The columns of `SCHEMA_OF_LEARNED`, of all steps of variants with numbers, in row groups of three sessions."""
    samples = [sample for batch in steps(Variant({}, numbers=True)) for sample in batch]
    groups = [list(group) for _, group in itertools.groupby(samples, key=lambda s: s.session)]
    columns: dict[str, list[Any]] = {name: [getattr(group[0], name) for group in groups] for name in ("user", "income")}
    for name in ("label", "ad_item", "ad_rate"):
        columns[name] = [[getattr(sample, name) for sample in group] for group in groups]
    (folder / "train").mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "train/samples.parquet", row_group_size=3)


def _make(url: str, name: str, table: dict[int, np.ndarray]) -> FeatureStore:
    drawn = {"backbone": "drawn", "layer": "none", "weights_digest": "0", "preprocessing": "none"}
    spec, rows = ExtractorSpec(**drawn, compute_dtype="float32"), np.stack(list(table.values()))
    info = StoreInfo(num_shards=NUM_SHARDS, name=name, dim=rows.shape[1], dtype="float32", extractor=spec)
    store = FeatureStore.create(url, info)
    store.put(FeatureRows.of([f"{name}-{key}" for key in table], rows, keys=list(table)))
    return store


def steps(variant: Variant) -> list[list[Sample]]:
    """The global batches, the same for any number of ranks."""
    draw = np.random.default_rng(SEED + 1)
    images = keys_in_one_shard() if variant.one_shard else list(features())[:90]
    if variant.lacking:
        images = [*images[:20], 11, 12, 13, 14]  # keys without a feature
    session, result = 0, []
    for _ in range(variant.steps):
        samples: list[Sample] = []
        size = int(draw.integers(3, 12))
        while len(samples) < size:
            session += 1
            count = int(draw.integers(0, 7)) if session % 5 else 0
            behaviors = draw.integers(0, len(images), count)
            if count and session % 3 == 0:
                behaviors[:] = behaviors[0]
            for _ in range(min(int(draw.integers(1, 6)), size - len(samples))):
                ad = int(draw.integers(0, len(images)))
                samples.append(
                    Sample(
                        session,
                        user=_id(variant, "user", session % 30),
                        age=float(session % 7) / 7,
                        behavior_item=tuple(_id(variant, "item", int(b) % 30 - 15) for b in behaviors),
                        behavior_image=tuple(images[b] for b in behaviors),
                        ad_item=_id(variant, "item", ad % 30 - 15),
                        ad_image=images[ad],
                        ad_price=(float(draw.normal()), float(draw.normal())),
                        label=int(draw.integers(0, 2)),
                    )
                )
        result.append(samples)
    return result


def _id(variant: Variant, what: str, number: int) -> int:
    return hashed(f"{what} ü{number}") if variant.words else number


def pair_of(s: Sample) -> int:
    """The ID of an ad's item and image together."""
    return hashed(f'["{WORDS[s.ad_item]}",{s.ad_image}]')


def slice_of_rank(samples: list[Sample], deal: str, step: int, rank: int, num_ranks: int) -> list[Sample]:
    """The samples of one rank."""
    if deal == "starve":
        chosen = (num_ranks - 1, 0)[step % 2]
        return samples if rank == chosen else []
    if deal == "streams":
        return samples[rank::num_ranks]
    return samples[rank * len(samples) // num_ranks : (rank + 1) * len(samples) // num_ranks]


def batch_of(samples: list[Sample], global_batch: list[Sample], variant: Variant | None = None) -> Batch:
    """Samples of one rank, in a row in the global batch, as the arrays that the engine takes."""
    sessions = list(dict.fromkeys(s.session for s in samples))
    groups = [next(s for s in samples if s.session == session) for session in sessions]
    age, price = np.array([g.age for g in groups], np.float32), np.array([s.ad_price for s in samples], np.float32)
    buckets, learned, weights = {}, {}, {}
    if variant is not None and variant.weighted:
        weights["behavior_item"] = np.array([weight for g in groups for weight in g.item_weight], np.float32)
        weights["ad_item"] = np.array([s.ad_weight for s in samples], np.float32)
    if variant is not None and variant.numbers:
        known = {field.name: field for field in variant.schema.fields}
        ages = np.array([age for g in groups for age in g.behavior_age], np.float32)
        lengths, ones = [len(g.behavior_age) for g in groups], np.ones(len(samples), np.int32)
        buckets["behavior_age"] = Jagged(bucket_ids(known["behavior_age"], ages), np.array(lengths, np.int32))
        price_buckets = bucket_ids(known["ad_price_bucket"], price.reshape(-1, 2)[:, 0])
        buckets["ad_price_bucket"] = Jagged(price_buckets, ones)
        age, price = dense_values(known["age"], age), dense_values(known["ad_price"], price)
        learned = {"income": [g.income for g in groups], "ad_rate": [s.ad_rate for s in samples]}
        learned = {name: dense_values(known[name], np.array(each, np.float32)) for name, each in learned.items()}
    return Batch(
        fields=buckets
        | {
            "user": _jagged([[g.user] for g in groups]),
            "behavior_item": _jagged([g.behavior_item for g in groups]),
            "behavior_image_id": _jagged([g.behavior_image for g in groups]),
            "behavior_image": _jagged([g.behavior_image for g in groups]),
            "ad_item": _jagged([[s.ad_item] for s in samples]),
            "ad_image_id": _jagged([[s.ad_image] for s in samples]),
            "ad_image": _jagged([[s.ad_image] for s in samples]),
            "behavior_text": _jagged([g.behavior_image for g in groups]),
            "ad_text": _jagged([[s.ad_image] for s in samples]),
        },
        dense={"age": age.reshape(-1, 1), "ad_price": price.reshape(-1, 2)} | learned,
        group_of_sample_B=np.array([sessions.index(s.session) for s in samples], np.int64),
        label_B=np.array([s.label for s in samples], np.float32),
        group_id_B=np.array([s.user for s in samples], np.int64),
        global_samples=len(global_batch),
        weights=weights,
        place_B=np.array([global_batch.index(sample) for sample in samples], np.int64),
    )


def batch_of_file(samples: list[Sample], global_batch: list[Sample], schema: Schema) -> Batch:
    """The same as columns of a file would be read."""
    groups = [list(group) for _, group in itertools.groupby(samples, key=lambda s: s.session)]
    texts, lists = pa.list_(pa.string()), pa.list_(pa.int64())
    columns = {
        "user": pa.array([WORDS[group[0].user] for group in groups], pa.string()).dictionary_encode(),
        "age": pa.array([group[0].age for group in groups], pa.float32()),
        "behavior_item": pa.array([[WORDS[item] for item in group[0].behavior_item] for group in groups], texts),
        "behavior_image": pa.array([group[0].behavior_image for group in groups], lists),
        "behavior_image_id": pa.array([group[0].behavior_image for group in groups], lists),
        "ad_item": pa.array([[WORDS[s.ad_item] for s in group] for group in groups], texts),
        "ad_image": pa.array([[s.ad_image for s in group] for group in groups], lists),
        "ad_price": pa.array([[s.ad_price for s in group] for group in groups], pa.list_(pa.list_(pa.float64()))),
        "label": pa.array([[s.label for s in group] for group in groups], lists),
    }
    read = decode(pa.table(columns), rules_of(schema), schema.label, "words.parquet", 0)
    batch = assemble(schema, [Piece(read, 0, read.num_samples)], len(global_batch))
    return replace(batch, place_B=np.array([global_batch.index(sample) for sample in samples], np.int64))


def _jagged(rows: list) -> Jagged:
    values = np.array([value for row in rows for value in row], np.int64)
    return Jagged(values, np.array([len(row) for row in rows], np.int32))
