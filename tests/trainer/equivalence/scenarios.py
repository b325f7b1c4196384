"""Small worlds on which a run of P ranks has to equal one process: data, settings, and who gets which samples."""

import itertools
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import xxhash

from featurestore import ExtractorSpec, FeatureRows, FeatureStore, StoreInfo
from featurestore.keys import shard_of
from featurestore.upkeep.recode import recode
from trainer.batch import Batch, BatchPosition, Jagged
from trainer.columns import decode, rules_of
from trainer.data import Piece, assemble
from trainer.inputs.transform import bucket_ids, dense_values
from trainer.options import ExactTableConfig, ModelConfig, OptimConfig
from trainer.schema import Field, Schema

DIM, NUM_SHARDS, STEPS, SEED = 16, 8, 20, 7
# eps lies above the rounding of float32: below it, Adam makes whole steps of the noise around a gradient of zero.
OPTIM = OptimConfig(lr=0.01, ids_lr=None, lr_gamma=0.5, lr_every=8, eps=1e-6, ids="rowwise_adam")

SCHEMA = Schema(
    fields=(
        Field(name="user", side="user", kind="id"),
        Field(name="age", side="user", kind="dense"),
        Field(name="behavior_item", side="user", kind="multi_id", table="item"),
        Field(name="behavior_image_id", side="user", kind="multi_id", table="image"),
        Field(name="behavior_image", side="user", kind="content"),
        Field(name="ad_item", side="ad", kind="id", table="item"),
        Field(name="ad_image_id", side="ad", kind="id", table="image", column="ad_image"),
        Field(name="ad_price", side="ad", kind="dense", width=2, context=True),
        Field(name="ad_image", side="ad", kind="content"),
    )
)

# Numbers scaled, and as IDs: buckets of the price, and of the behaviours' ages.
SCALES = {"age": {"transform": "standardize", "mean": (0.4,), "std": (0.3,)}, "ad_price": {"transform": "log1p"}}
BUCKETS = (
    Field(name="behavior_age", side="user", kind="multi_id", buckets="log2", beside="behavior_item"),
    Field(name="ad_price_bucket", side="ad", kind="id", boundaries=(-0.5, 0.0, 0.5), column="ad_price"),
)

TRANSFORMER: dict[str, object] = {"pooling": "transformer", "transformer_length": 4, "transformer_width": 6}


def hashed(text: str) -> int:
    """xxh3-64 of a text as a signed number."""
    number = xxhash.xxh3_64_intdigest(text.encode())
    return number - (1 << 64) if number >= 1 << 63 else number


# A second content of every item, in a store of its own, of another dimension and with visual vectors of another width.
TEXT_DIM, TEXT_WIDTH = 7, 3
SCHEMA_WITH_TEXTS = Schema(
    fields=(
        *SCHEMA.fields,
        Field(name="behavior_text", side="user", kind="content", store="texts", width=TEXT_WIDTH),
        Field(name="ad_text", side="ad", kind="content", store="texts", width=TEXT_WIDTH),
    )
)


# Users and items are texts in files that are read, and item and image of an ad are crossed into one more ID.
SCHEMA_OF_FILES = Schema(
    fields=(
        *SCHEMA.fields[:7],
        Field(name="ad_pair", side="ad", kind="id", table="item", columns=("ad_item", "ad_image")),
        *SCHEMA.fields[7:],
    )
)
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
    def ad_weight(self) -> float:
        """Of the ad's item."""
        return 0.25 + self.ad_item % 3


@dataclass(frozen=True)
class Scenario:
    """`deal`: how samples are dealt to ranks: "even" slices, or in turn all to the last or to the first rank.
    `words`: batches are read from files of `SCHEMA_OF_FILES`; `gallery`: there each image is several. `restart_at`: the
    step before which all ID rows begin anew. `most_ranks`: it is not run on more, to save time."""

    model: dict[str, object]
    missing: str = "error"
    lacking: bool = False
    deal: str = "even"
    one_shard: bool = False
    standardized: bool = False
    int8: bool = False
    id_l2: float = 0.0
    optimizers: dict[str, object] = field(default_factory=dict)
    restart_at: int | None = None
    texts: bool = False
    words: bool = False
    gallery: Literal["mean", "max"] | None = None
    weighted: bool = False
    numbers: bool = False
    most_ranks: int = 8
    dtypes: tuple[str, ...] = ("float64",)
    tables: dict[str, int | ExactTableConfig] = field(default_factory=lambda: {"user": 40, "item": 96, "image": 200})

    @property
    def schema(self) -> Schema:
        """The fields of a sample."""
        schema = SCHEMA_WITH_TEXTS if self.texts else SCHEMA_OF_FILES if self.words else SCHEMA
        if self.gallery:
            columns = {f"{side}_image": f"{side}_gallery" for side in ("ad", "behavior")}
            fields = [
                field.model_copy(update={"column": columns[field.name], "gallery": self.gallery})
                if field.name in columns
                else field
                for field in schema.fields
            ]
            schema = schema.model_copy(update={"fields": tuple(fields)})
        weights = {"behavior_item": "item_weight", "ad_item": "ad_weight"} if self.weighted else {}
        fields = [field.model_copy(update={"weights": weights.get(field.name)}) for field in schema.fields]
        if self.numbers:
            fields = [*(field.model_copy(update=SCALES.get(field.name)) for field in fields), *BUCKETS]
        return schema.model_copy(update={"fields": tuple(fields)})

    @property
    def optim(self) -> OptimConfig:
        """The optimisers' settings."""
        return OptimConfig(**{**OPTIM.model_dump(), "id_l2": self.id_l2, **self.optimizers})

    def config(self, dtype: str) -> ModelConfig:
        """The model's settings; products in the same type as the weights."""
        small = {"mlp": [10, 6], "embed_hidden": [8, 6], "visual_width": 5, "id_width": 5, "attention_hidden": 4}
        small |= {"id_init_std": 0.05}
        shards = 1 if self.one_shard else NUM_SHARDS
        return ModelConfig(
            **{**small, "table_shards": shards, "tables": self.tables, **self.model}, compute_dtype=dtype
        )


def exact(max_rows: int, admit_after: int) -> ExactTableConfig:
    """Settings of a table with a row for each id."""
    return ExactTableConfig(kind="exact", max_rows=max_rows, admit_after=admit_after)


SCENARIOS = {
    # Keys shared by ranks, a key many times in one sample, samples that no number of ranks divides.
    # torch's start has biases; those that begin at 0 and get hardly a gradient would be mostly rounding in float32.
    "both_attentive": Scenario({"images": "both", "init": "torch"}, standardized=True, dtypes=("float64", "float32")),
    # Vectors of two widths: two alltoalls of vectors in one step.
    "two_widths_two_models": Scenario(
        {"images": "both", "visual_width": 3, "shared_image_model": False}, deal="starve"
    ),
    "sum_rank_without_data": Scenario(
        {"images": "both", "pooling": "sum"}, deal="starve", dtypes=("float64", "float32")
    ),
    # Every image and every ID row belongs to rank 0.
    "one_owner": Scenario({"images": "behavior"}, one_shard=True),
    "behavior_sum": Scenario({"images": "behavior", "pooling": "sum"}),
    # 3 rows for 30 items: many ids share one.
    "ad_colliding_ids": Scenario({"images": "ad"}, tables={"user": 8, "item": 3, "image": 200}),
    "ids_only": Scenario({"images": "none"}, deal="starve"),
    # With zero images and no bias, units are rounding errors on either side of ReLU's kink; torch's start has a bias.
    "missing_zeros": Scenario({"images": "both", "init": "torch"}, missing="zeros", lacking=True),
    # Codes go into E as they are; the reference takes the numbers that they stand for.
    "int8_codes": Scenario({"images": "both"}, missing="learned", lacking=True, standardized=True, int8=True),
    # Many ids in one row, which its owner shrinks once a step; samples whose ad is taken for a new one.
    "l2_and_dropout": Scenario(
        {"images": "both", "id_dropout": 0.4}, id_l2=0.3, tables={"user": 8, "item": 3, "image": 200}
    ),
    "dropout_rank_without_data": Scenario({"images": "behavior", "id_dropout": 0.4}, id_l2=0.3, deal="starve"),
    # Every optimiser of ID rows; few rows are in every step, some in one; rates of their own, decay and warm-up.
    "adam": Scenario({"images": "both"}, optimizers={"ids": "adam", "ids_lr": 0.03, "warmup_steps": 5}),
    "adam_rank_without_data": Scenario(
        {"images": "none", "id_init_std": 1e-3},
        optimizers={"ids": "adam", "ids_weight_decay": 0.3, "weight_decay": 0.2},
        id_l2=0.3,
        deal="starve",
        restart_at=11,
        dtypes=("float64", "float32"),
    ),
    "rowwise_adam_restart": Scenario({"images": "ad"}, optimizers={"weight_decay": 0.5}, restart_at=9, most_ranks=2),
    "adagrad": Scenario({"images": "none"}, optimizers={"ids": "adagrad", "ids_lr": 0.2}, deal="starve", most_ranks=2),
    "rowwise_adagrad": Scenario(
        {"images": "none"}, optimizers={"ids": "rowwise_adagrad", "warmup_steps": 30}, id_l2=0.3, most_ranks=2
    ),
    "ftrl": Scenario(
        {"images": "none"},
        optimizers={"ids": "ftrl", "ids_lr": 0.5, "ftrl_l1": 0.05, "ftrl_l2": 0.1},
        deal="starve",
        restart_at=13,
        most_ranks=2,
    ),
    # A row for each id that has come three times; the others share the cold row of their shard.
    "exact": Scenario(
        {"images": "both", "id_dropout": 0.4}, id_l2=0.3, tables={"user": 40, "item": exact(96, 3), "image": 200}
    ),
    # Shards of two rows that are soon full, and ids of images that hardly ever come twice.
    "exact_rank_without_data": Scenario(
        {"images": "none"},
        tables={"user": exact(16, 1), "item": 96, "image": exact(900, 2)},
        optimizers={"ids": "adam"},
        deal="starve",
        restart_at=12,
    ),
    # Masks by image, two E's on int8 codes; images that E learns nothing from, whose ads are taken for new ones.
    "embedding_dropout": Scenario(
        {"feature_dropout": 0.3, "embed_dropout": 0.2, "shared_image_model": False},
        optimizers={"weight_decay": 0.2, "embed_weight_decay": 0.6},
        missing="learned",
        lacking=True,
        standardized=True,
        int8=True,
    ),
    "image_holdout": Scenario(
        {"image_holdout": 0.4, "feature_dropout": 0.3, "id_dropout": 0.2, "id_init_std": 1e-4},
        standardized=True,
        deal="starve",
    ),
    "image_holdout_texts": Scenario({"image_holdout": 0.4, "id_init_std": 0.0}, texts=True, most_ranks=2),
    "image_holdout_two_towers": Scenario(
        {"base": "two_tower", "image_holdout": 0.4, "id_init_std": 1e-4}, most_ranks=2
    ),
    "missing_learned": Scenario({"images": "both", "shared_image_model": False}, missing="learned", lacking=True),
    # Histories longer than its length, and empty ones; ad image and IDs beside each behaviour, or the IDs alone.
    "transformer": Scenario({"images": "both", **TRANSFORMER, "transformer_layers": 2}),
    "transformer_rank_without_data": Scenario({"images": "behavior", **TRANSFORMER}, deal="starve", most_ranks=3),
    # Every aggregator and base net; histories are empty, short, and longer than concat_length.
    "concat": Scenario({"pooling": "concat", "concat_length": 3}, most_ranks=2),
    "max": Scenario({"pooling": "max"}, most_ranks=2),
    "mean": Scenario({"pooling": "mean", "image_products": False}, most_ranks=2),
    "multi_query": Scenario({"pooling": "multi_query", "init": "torch"}, most_ranks=2),
    "multi_query_rank_without_data": Scenario({"pooling": "multi_query", "init": "torch"}, deal="starve", most_ranks=2),
    "max_rank_without_data": Scenario({"pooling": "max", "images": "behavior"}, deal="starve", most_ranks=2),
    "concat_rank_without_data": Scenario({"pooling": "concat", "concat_length": 3}, deal="starve", most_ranks=2),
    "lr_ids_only": Scenario({"base": "lr", "images": "none"}, most_ranks=2),
    "lr": Scenario({"base": "lr", "pooling": "sum"}, deal="starve", most_ranks=2),
    "din_ids_only": Scenario({"base": "din", "images": "none"}, most_ranks=2),
    "din": Scenario({"base": "din", "pooling": "multi_query", "id_dropout": 0.4}, deal="starve", most_ranks=2),
    "dcn_ids_only": Scenario({"base": "dcn", "images": "none", "cross_structure": "stacked"}, most_ranks=2),
    "dcn": Scenario({"base": "dcn", "pooling": "mean", "cross_layers": 2}, deal="starve", most_ranks=2),
    "texts": Scenario({"pooling": "multi_query"}, texts=True, standardized=True, most_ranks=2),
    "texts_missing": Scenario(
        {"base": "din", "shared_image_model": False, "pooling": "sum"},
        texts=True,
        missing="learned",
        lacking=True,
        deal="starve",
        most_ranks=2,
    ),
    # Layers whose statistics are those of all ranks' rows, and units that are dropped by place; the ways of the paper.
    # Batch norm takes away a bias before it; of torch's start it is not only rounding.
    "batch_norm": Scenario({"images": "both", "batch_norm": True, "dropout": 0.3, "init": "torch"}),
    "batch_norm_rank_without_data": Scenario(
        {"base": "dcn", "images": "ad", "batch_norm": True, "init": "torch"}, deal="starve"
    ),
    "dice": Scenario({"base": "din", "images": "both", "activation": "dice"}),
    "dice_rank_without_data": Scenario({"base": "din", "images": "none", "activation": "dice"}, deal="starve"),
    "dropout": Scenario({"images": "none", "dropout": 0.5}, deal="starve"),
    "paper": Scenario(
        {"images": "both", "activation": "prelu", "multi_hot": "sum", "init": "torch"}, dtypes=("float64", "float32")
    ),
    "finalmlp_ids_only": Scenario({"base": "finalmlp", "images": "none", "feature_gates": False}, most_ranks=2),
    "finalmlp": Scenario(
        {"base": "finalmlp", "fusion_heads": 2, "dropout": 0.2, "activation": "dice", "gate_hidden": 3},
        deal="starve",
        most_ranks=2,
    ),
    "words": Scenario({"images": "both", "id_dropout": 0.4}, words=True, deal="starve"),
    # Galleries of 0 to 3 images, of which some are of other ads or behaviours too, or have no feature.
    "gallery_mean": Scenario(
        {"images": "both", "init": "torch"},
        words=True,
        gallery="mean",
        missing="learned",
        lacking=True,
        standardized=True,
    ),
    "gallery_max": Scenario({"pooling": "sum"}, words=True, gallery="max", deal="starve", most_ranks=2),
    "gallery_two_towers": Scenario({"base": "two_tower"}, words=True, gallery="mean", deal="starve", most_ranks=2),
    "two_towers": Scenario(
        {"base": "two_tower", "images": "both", "tower_width": 4}, deal="starve", dtypes=("float64", "float32")
    ),
    # Ids that count more or less than once, or against: of each behaviour's item, and of the ad's.
    "weights": Scenario({"images": "both", "multi_hot": "sum"}, weighted=True, deal="starve"),
    "numbers": Scenario({"images": "both"}, numbers=True, deal="starve"),
    "numbers_din_ids_only": Scenario({"base": "din", "images": "none"}, numbers=True, weighted=True, most_ranks=2),
    "weights_din_ids_only": Scenario({"base": "din", "images": "none"}, weighted=True, most_ranks=2),
    "weights_two_towers_ids_only": Scenario({"base": "two_tower", "images": "none"}, weighted=True, most_ranks=2),
    "two_towers_ids_only": Scenario({"base": "two_tower", "images": "none", "tower_width": 3}),
}


def scenarios_for(num_ranks: int) -> dict[str, Scenario]:
    """Those that are run on so many ranks."""
    return {name: scenario for name, scenario in SCENARIOS.items() if num_ranks <= scenario.most_ranks}


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
    """A store of `features`, and beside it one of their codes and one of `texts`."""
    images = _make(str(path), "images", features())
    recode(images, f"{path}-int8", "int8")
    _make(f"{path}-texts", "texts", texts())


def _make(url: str, name: str, table: dict[int, np.ndarray]) -> FeatureStore:
    spec = ExtractorSpec(
        backbone="drawn", layer="none", weights_digest="0", preprocessing="none", compute_dtype="float32"
    )
    rows = np.stack(list(table.values()))
    info = StoreInfo(num_shards=NUM_SHARDS, name=name, dim=rows.shape[1], dtype="float32", extractor=spec)
    store = FeatureStore.create(url, info)
    store.put(FeatureRows.of([f"{name}-{key}" for key in table], rows, keys=list(table)))
    return store


def steps(scenario: Scenario) -> list[list[Sample]]:
    """The global batches, the same for any number of ranks."""
    draw = np.random.default_rng(SEED + 1)
    images = keys_in_one_shard() if scenario.one_shard else list(features())[:90]
    if scenario.lacking:
        images = [*images[:20], 11, 12, 13, 14]  # keys without a feature
    session, result = 0, []
    for _ in range(STEPS):
        samples: list[Sample] = []
        size = int(draw.integers(5, 24))
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
                        user=_id(scenario, "user", session % 30),
                        age=float(session % 7) / 7,
                        behavior_item=tuple(_id(scenario, "item", int(b) % 30 - 15) for b in behaviors),
                        behavior_image=tuple(images[b] for b in behaviors),
                        ad_item=_id(scenario, "item", ad % 30 - 15),
                        ad_image=images[ad],
                        ad_price=(float(draw.normal()), float(draw.normal())),
                        label=int(draw.integers(0, 2)),
                    )
                )
        result.append(samples)
    return result


def _id(scenario: Scenario, what: str, number: int) -> int:
    return hashed(f"{what} ü{number}") if scenario.words else number


@cache
def gallery_of(key: int) -> tuple[int, ...]:
    """The images that stand for one image where there are galleries: none, or it and up to two more, or it again."""
    draw = np.random.default_rng(key % 2**32)
    others = [list(features())[place] for place in draw.integers(0, 30, 2)]
    return (key, *others, key)[: int(draw.integers(0, 5))]


def pair_of(s: Sample) -> int:
    """The ID of an ad's item and image together."""
    return hashed(f'["{WORDS[s.ad_item]}",{s.ad_image}]')


def slice_of_rank(samples: list[Sample], deal: str, step: int, rank: int, num_ranks: int) -> list[Sample]:
    """The samples of one rank."""
    if deal == "starve":
        chosen = (num_ranks - 1, 0)[step % 2]
        return samples if rank == chosen else []
    return samples[rank * len(samples) // num_ranks : (rank + 1) * len(samples) // num_ranks]


def batch_of(samples: list[Sample], global_batch: list[Sample], scenario: Scenario | None = None) -> Batch:
    """Samples of one rank, in a row in the global batch, as the arrays that the engine takes."""
    sessions = list(dict.fromkeys(s.session for s in samples))
    groups = [next(s for s in samples if s.session == session) for session in sessions]
    age, price = np.array([g.age for g in groups], np.float32), np.array([s.ad_price for s in samples], np.float32)
    buckets = {}
    if scenario is not None and scenario.numbers:
        known = {field.name: field for field in scenario.schema.fields}
        ages = np.array([age for g in groups for age in g.behavior_age], np.float32)
        buckets["behavior_age"] = Jagged(
            bucket_ids(known["behavior_age"], ages), np.array([len(g.behavior_age) for g in groups], np.int32)
        )
        first_price = price.reshape(-1, 2)[:, 0]
        buckets["ad_price_bucket"] = Jagged(
            bucket_ids(known["ad_price_bucket"], first_price), np.ones(len(samples), np.int32)
        )
        age, price = dense_values(known["age"], age), dense_values(known["ad_price"], price)
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
        dense={
            "age": age.reshape(-1, 1),
            "ad_price": price.reshape(-1, 2),
        },
        group_of_sample_B=np.array([sessions.index(s.session) for s in samples], np.int64),
        label_B=np.array([s.label for s in samples], np.float32),
        group_id_B=np.array([s.user for s in samples], np.int64),
        global_samples=len(global_batch),
        weights={
            "behavior_item": np.array([weight for g in groups for weight in g.item_weight], np.float32),
            "ad_item": np.array([s.ad_weight for s in samples], np.float32),
        }
        if scenario is not None and scenario.weighted
        else {},
        first_sample=global_batch.index(samples[0]) if samples else 0,
    )


def batch_of_file(samples: list[Sample], global_batch: list[Sample], schema: Schema) -> Batch:
    """The same as columns of a file would be read."""
    groups = [list(group) for _, group in itertools.groupby(samples, key=lambda s: s.session)]
    texts, lists, nested = pa.list_(pa.string()), pa.list_(pa.int64()), pa.list_(pa.list_(pa.int64()))
    columns = {
        "user": pa.array([WORDS[group[0].user] for group in groups], pa.string()).dictionary_encode(),
        "age": pa.array([group[0].age for group in groups], pa.float32()),
        "behavior_item": pa.array([[WORDS[item] for item in group[0].behavior_item] for group in groups], texts),
        "behavior_image": pa.array([group[0].behavior_image for group in groups], lists),
        "behavior_image_id": pa.array([group[0].behavior_image for group in groups], lists),
        "ad_item": pa.array([[WORDS[s.ad_item] for s in group] for group in groups], texts),
        "ad_image": pa.array([[s.ad_image for s in group] for group in groups], lists),
        "behavior_gallery": pa.array([list(map(gallery_of, group[0].behavior_image)) for group in groups], nested),
        "ad_gallery": pa.array([[gallery_of(s.ad_image) for s in group] for group in groups], nested),
        "ad_price": pa.array([[s.ad_price for s in group] for group in groups], pa.list_(pa.list_(pa.float64()))),
        "label": pa.array([[s.label for s in group] for group in groups], lists),
    }
    read = decode(pa.table(columns), rules_of(schema), schema.label, "words.parquet", 0)
    piece = Piece(read, np.arange(len(groups)), read.sample_offsets[:-1], read.sample_offsets[1:])
    batch = assemble(schema, [piece], len(global_batch), BatchPosition(0, 0))
    return replace(batch, first_sample=global_batch.index(samples[0]) if samples else 0)


def _jagged(rows: list) -> Jagged:
    values = np.array([value for row in rows for value in row], np.int64)
    return Jagged(values, np.array([len(row) for row in rows], np.int32))
