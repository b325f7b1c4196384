"""One table of what can be trained, stored and served: each promise is tested with every variant that it is made for.

tests/trainer/equivalence trains every variant on P ranks, whose run has to equal that of one process; its worlds.py has
their data. A variant with `served` is also trained from files, exported, scored and explained: see
tests/serving/scoring/variants.py. A new net, aggregator, optimiser or content is a row here.
"""

from dataclasses import dataclass, field
from typing import Any, get_args

from trainer.config import ExactTableConfig, IdOptimizer, ModelConfig, OptimConfig, Pooling
from trainer.samples.survey import fill_in
from trainer.schema.fields import Field, Schema

DIM, NUM_SHARDS, SEED = 16, 8, 7
STEPS, MANY_STEPS = 3, 12
"""Of a variant, whose learning rate falls before the last one; and of one whose rows make room or begin anew."""
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
"""Of losses and weights, by the dtype of the weights."""
DTYPES = tuple(TOLERANCE)
EXACT = "{kind: exact, max_rows: 24, admit_after: 2}"
TABLES = "user: 64, item: 64, image: 64, category: 16, scene: 16"
"""Of a whole run: a table with a row for each ID, and the tables of the packaged fields."""
# eps lies above the rounding of float32: below it, Adam makes whole steps of the noise around a gradient of zero.
OPTIM = OptimConfig(lr=0.01, ids_lr=None, lr_gamma=0.5, lr_every=2, eps=1e-6, ids="rowwise_adagrad")

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

# Numbers of which some are missing, scaled by what the ranks together learn from the samples.
LEARNED = (
    Field(name="income", side="user", kind="dense", transform="log_standardize", fill="mean"),
    Field(name="ad_rate", side="ad", kind="dense", transform="standardize", fill=0.5),
)
SCHEMA_OF_LEARNED = Schema(fields=(Field(name="ad_item", side="ad", kind="id", table="item"), *LEARNED))

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


@dataclass(frozen=True)
class Variant:
    """`deal`: how samples are dealt to ranks: "even" slices, in "streams" that lie scattered over the batch, or, to
    "starve" the others, in turn all to the last or to the first rank.
    `words`: batches are read from files of `SCHEMA_OF_FILES`. `steps_of_day`: after so many steps there is another day.
    `statistics`: what ranks found out about the numbers of `LEARNED`.
    `biased`: linear layers start as torch's do, with biases. `most_ranks`: it is not run on more, to save time.
    `served`: what else a whole run is told that is served afterwards, if it is; `schema` names what its schema has
    besides the packaged fields. Such a run takes seconds to train, export and explain: one has several kinds, of which
    none hides another."""

    model: dict[str, object]
    served: dict[str, Any] | None = None
    missing: str = "error"
    lacking: bool = False
    biased: bool = False
    deal: str = "even"
    one_shard: bool = False
    standardized: bool = False
    compact: bool = False
    optimizers: dict[str, object] = field(default_factory=dict)
    steps_of_day: int | None = None
    texts: bool = False
    words: bool = False
    weighted: bool = False
    numbers: bool = False
    statistics: dict[str, dict[str, Any]] = field(default_factory=dict)
    most_ranks: int = 8
    dtypes: tuple[str, ...] = ("float64",)
    tables: dict[str, int | ExactTableConfig] = field(default_factory=lambda: {"user": 40, "item": 96, "image": 200})

    @property
    def schema(self) -> Schema:
        """The fields of a sample."""
        schema = SCHEMA_WITH_TEXTS if self.texts else SCHEMA_OF_FILES if self.words else SCHEMA
        weights = {"behavior_item": "item_weight", "ad_item": "ad_weight"} if self.weighted else {}
        fields = [field.model_copy(update={"weights": weights.get(field.name)}) for field in schema.fields]
        if self.numbers:
            fields = [*(field.model_copy(update=SCALES.get(field.name)) for field in fields), *BUCKETS, *LEARNED]
        return fill_in(schema.model_copy(update={"fields": tuple(fields)}), self.statistics)

    @property
    def steps(self) -> int:
        """The number of steps."""
        has_exact = any(isinstance(table, ExactTableConfig) for table in self.tables.values())
        return MANY_STEPS if has_exact else STEPS

    @property
    def optim(self) -> OptimConfig:
        """The optimisers' settings."""
        return OptimConfig(**{**OPTIM.model_dump(), **self.optimizers})

    def config(self, dtype: str) -> ModelConfig:
        """The model's settings; products in the same type as the weights."""
        small = {"mlp": [10, 6], "embed_hidden": [8, 6], "visual_width": 5, "id_width": 5, "attention_hidden": 4}
        small |= {"id_init_std": 0.05}
        shards = 1 if self.one_shard else NUM_SHARDS
        small |= {"table_shards": shards, "tables": self.tables}
        return ModelConfig(**{**small, **self.model}, compute_dtype=dtype)


def exact(max_rows: int, admit_after: int, **rules: Any) -> ExactTableConfig:
    """Settings of a table with a row for each id."""
    return ExactTableConfig(kind="exact", max_rows=max_rows, admit_after=admit_after, **rules)


VARIANTS = {
    # Keys shared by ranks, a key many times in one sample, samples that no number of ranks divides.
    # With biases: those that begin at 0 and get hardly a gradient would be mostly rounding in float32.
    "plain": Variant({"images": "both"}, {}, biased=True, standardized=True, dtypes=DTYPES),
    # Vectors of two widths: two alltoalls of vectors in one step.
    "two_widths": Variant({"images": "both", "visual_width": 3}, deal="starve"),
    "sum_rank_without_data": Variant({"images": "both", "pooling": "sum"}, deal="starve", dtypes=DTYPES),
    # Every image and every ID row belongs to rank 0.
    "one_owner": Variant({"images": "behavior"}, one_shard=True),
    "images_behavior": Variant({"images": "behavior", "pooling": "sum"}, {"model__pooling": "attentive"}),
    # 3 rows for 30 items: many ids share one.
    "ad_colliding_ids": Variant({"images": "ad"}, tables={"user": 8, "item": 3, "image": 200}),
    "images_none": Variant({"images": "none"}, {"optim__ids": "rowwise_adagrad"}, deal="starve"),
    # With zero images and no bias, units are rounding errors on either side of ReLU's kink.
    "missing_zeros": Variant({"images": "both"}, biased=True, missing="zeros", lacking=True),
    # The components of a compact store, all scaled by one number.
    "compact": Variant({"images": "both"}, standardized=True, compact=True),
    # Many ids in one row; samples whose ad is taken for a new one.
    "dropped_ids": Variant({"images": "both", "id_dropout": 0.4}, tables={"user": 8, "item": 3, "image": 200}),
    "dropout_rank_without_data": Variant({"images": "behavior", "id_dropout": 0.4}, deal="starve"),
    # Both optimisers of ID rows; few rows are in every step, some in one; rates of their own, decay and warm-up.
    "adam": Variant({"images": "both"}, optimizers={"ids": "adam", "ids_lr": 0.03, "warmup_steps": 3}),
    "adam_rank_without_data": Variant(
        {"images": "none", "id_init_std": 1e-3}, optimizers={"ids": "adam"}, deal="starve", dtypes=DTYPES
    ),
    "rowwise_adagrad": Variant(
        {"images": "none"}, optimizers={"ids": "rowwise_adagrad", "warmup_steps": 30}, most_ranks=2
    ),
    # A row for each user, and for items that have come three times; the others share the cold row of their shard. Rows
    # that a whole day, of two steps, has not used are gone after it, and counts are halved.
    "exact": Variant(
        {"images": "both", "id_dropout": 0.4},
        {"tables": f"user: {EXACT}, item: {EXACT}, image: 64, category: 16, scene: 16"}
        | {"data__missing": "error", "data__store_version": 1},
        tables={"user": exact(64, 1, expire_days=1), "item": exact(96, 3, expire_days=1), "image": 200},
        steps_of_day=2,
    ),
    # Shards of two rows that are soon full, and ids of images that hardly ever come twice.
    "exact_rank_without_data": Variant(
        {"images": "none"},
        tables={"user": exact(16, 1, when_full="refuse"), "item": 96, "image": exact(900, 2)},
        optimizers={"ids": "adam"},
        deal="starve",
    ),
    # Full shards in which the rows longest unused make room, one at a time.
    "exact_evicting": Variant(
        {"images": "both"},
        tables={"user": exact(16, 1), "item": exact(24, 1), "image": exact(64, 1)},
        optimizers={"ids": "adam", "ids_lr": 0.03},
    ),
    # A rank may own the only shard, and three rows or more make room at once.
    "exact_evicting_rank_without_data": Variant(
        {"images": "none"},
        tables={"user": exact(20, 1), "item": exact(24, 2), "image": exact(40, 1)},
        deal="starve",
        one_shard=True,
    ),
    "id_proxy": Variant(
        {"images": "both", "id_proxy": True, "id_dropout": 0.4}, {"data__missing": "learned"}, words=True, deal="starve"
    ),
    "id_proxy_image_dropout_texts": Variant(
        {"id_proxy": True, "image_dropout": 0.3, "id_init_std": 1e-4}, texts=True, most_ranks=2
    ),
    "image_dropout": Variant(
        {"images": "both", "image_dropout": 0.4, "id_init_std": 1e-4}, deal="starve", most_ranks=2
    ),
    # Ads without a row of their own: p(v) is added to the cold row of their shard, which they train together.
    "exact_id_proxy_two_towers": Variant(
        {"base": "two_tower", "id_proxy": True, "id_dropout": 0.4},
        tables={"user": 40, "item": exact(96, 3), "image": 200},
        most_ranks=2,
    ),
    "image_dropout_two_towers": Variant({"base": "two_tower", "image_dropout": 0.4, "id_init_std": 1e-4}, most_ranks=2),
    "missing_learned": Variant({"images": "both"}, missing="learned", lacking=True, standardized=True),
    # Every aggregator and base net; histories are empty, short, and longer than pooling_length.
    "concat": Variant(
        {"pooling": "concat", "pooling_length": 3},
        {"model__image_products": "false", "model__multi_hot": "sum"},
        most_ranks=2,
    ),
    "max": Variant({"pooling": "max"}, most_ranks=2),
    "mean": Variant({"pooling": "mean", "image_products": False}, most_ranks=2),
    "multi_query": Variant({"pooling": "multi_query"}, biased=True, most_ranks=2),
    "multi_query_rank_without_data": Variant({"pooling": "multi_query"}, biased=True, deal="starve", most_ranks=2),
    "max_rank_without_data": Variant({"pooling": "max", "images": "behavior"}, deal="starve", most_ranks=2),
    "concat_rank_without_data": Variant({"pooling": "concat", "pooling_length": 3}, deal="starve", most_ranks=2),
    "lr_ids_only": Variant({"base": "lr", "images": "none"}, most_ranks=2),
    "lr": Variant(
        {"base": "lr", "pooling": "sum"},
        {"model__images": "ad", "model__compute_dtype": "float64"},
        deal="starve",
        most_ranks=2,
    ),
    "din_ids_only": Variant({"base": "din", "images": "none"}, most_ranks=2),
    "din": Variant({"base": "din", "pooling": "multi_query", "id_dropout": 0.4}, deal="starve", most_ranks=2),
    "dcn_ids_only": Variant({"base": "dcn", "images": "none"}, most_ranks=2),
    "dcn": Variant({"base": "dcn", "pooling": "mean", "cross_layers": 2}, deal="starve", most_ranks=2),
    "contents": Variant(
        {"pooling": "multi_query"},
        {"schema": "contents", "data__missing": "learned", "model__base": "dcn", "model__pooling": "max"},
        texts=True,
        standardized=True,
        most_ranks=2,
    ),
    "contents_missing": Variant(
        {"base": "din", "pooling": "sum"}, texts=True, missing="learned", lacking=True, deal="starve", most_ranks=2
    ),
    # Units that are dropped by place; the ways of the paper.
    "dropout": Variant({"images": "none", "dropout": 0.5}, deal="starve"),
    "dropout_streams": Variant({"images": "behavior", "dropout": 0.5, "id_dropout": 0.4}, deal="streams", most_ranks=2),
    "paper": Variant({"images": "both", "activation": "prelu", "multi_hot": "sum"}, biased=True, dtypes=DTYPES),
    "finalmlp_ids_only": Variant({"base": "finalmlp", "images": "none"}, most_ranks=2),
    "finalmlp": Variant(
        {"base": "finalmlp", "dropout": 0.2, "pooling": "multi_query"}, {}, biased=True, deal="starve", most_ranks=2
    ),
    "words": Variant({"images": "both", "id_dropout": 0.4}, words=True, deal="starve"),
    "two_towers": Variant(
        {"base": "two_tower", "images": "both", "tower_width": 4},
        {"model__pooling": "sum", "model__image_dropout": 0.3, "model__id_dropout": 0.3},
        deal="starve",
        dtypes=DTYPES,
    ),
    # Ids that count more or less than once, or against: of each behaviour's item, and of the ad's.
    "weights": Variant({"images": "both", "multi_hot": "sum"}, weighted=True, deal="starve"),
    "inputs": Variant(
        {"images": "both"},
        {"schema": "inputs", "model__base": "din", "model__pooling": "mean"}
        | {"tables": f"{TABLES}, shop: 32, both: 64, scene_item: 64, tags: 32"},
        numbers=True,
        deal="starve",
    ),
    "inputs_din_ids_only": Variant({"base": "din", "images": "none"}, numbers=True, weighted=True, most_ranks=2),
    "weights_din_ids_only": Variant({"base": "din", "images": "none"}, weighted=True, most_ranks=2),
    "weights_two_towers_ids_only": Variant({"base": "two_tower", "images": "none"}, weighted=True, most_ranks=2),
    "two_towers_ids_only": Variant({"base": "two_tower", "images": "none", "tower_width": 3}),
}
VARIANTS |= {  # an aggregator that is not above has a variant of its own
    pooling: Variant({"pooling": pooling}, {}, biased=True, deal="starve", most_ranks=2)
    for pooling in get_args(Pooling)
    if pooling not in {each.model.get("pooling", ModelConfig().pooling) for each in VARIANTS.values()}
}
VARIANTS |= {  # as has an optimiser of ID rows
    ids: Variant({"images": "none"}, optimizers={"ids": ids}, deal="starve", most_ranks=2)
    for ids in get_args(IdOptimizer)
    if ids not in {each.optim.ids for each in VARIANTS.values()}
}

SERVED = {
    name: {f"model__{setting}": value for setting, value in each.model.items()} | each.served
    for name, each in VARIANTS.items()
    if each.served is not None
}
"""Settings of the whole runs that are served, by name."""

FEW = (
    "plain/float64",
    "two_widths/float64",
    "sum_rank_without_data/float64",
    "one_owner/float64",
    "adam_rank_without_data/float64",
    "exact_evicting/float64",
    "exact_evicting_rank_without_data/float64",
    "lr/float64",
    "contents_missing/float64",
)
"""Runs that `make test` makes on four ranks and under torchrun too, NAME/DTYPE: each kind of collective, of splits and
of state is in one of them. `make test-slow` makes the others there."""


def has_other_ways(num_ranks: int, part: str) -> bool:
    """Whether a part of the runs has the other ways of the first variant, too: of four ranks, the rest."""
    return part == "all" or (part == "few") == (num_ranks < 4)


def runs_of(num_ranks: int, part: str) -> list[tuple[str, str]]:
    """Choose the runs of a job, as name and dtype: of so many ranks, "all", "few" (`FEW`) or "rest"."""
    runs = [(n, dtype) for n, each in VARIANTS.items() if num_ranks <= each.most_ranks for dtype in each.dtypes]
    return [run for run in runs if part == "all" or ("/".join(run) in FEW) == (part == "few")]
