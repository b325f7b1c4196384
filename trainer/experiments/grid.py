"""What is compared: the variants of each table, with the paper's figures next to them.

Source of the figures: Ge et al., "Image Matters" (arXiv 1711.06505), tables 3, 4, 5, 6 and 8 and figure 5.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from featurestore.text import DType


@dataclass(frozen=True)
class Variant:
    """One row of a table: settings of a run over those that all rows share, and what the paper measured, if it did.

    `days`: which days a run learns and is tested on, where the samples have days; `warm`: the variant that it begins
    with, of the same seed; `reduced`: dims and dtype of the compact store in the place of data.store's, made once.
    """

    name: str
    settings: tuple[str, ...] = ()
    paper_gauc: float | None = None
    days: str = "all"
    warm: "Variant | None" = None
    needs_semantic_ids: bool = False
    reduced: tuple[int, DType] | None = None


@dataclass(frozen=True)
class Experiment:
    """One table: its first variant is the baseline that the others are compared with."""

    name: str
    title: str
    variants: tuple[Variant, ...]
    note: str = ""
    pairs: tuple[tuple[str, str], ...] = field(default=())
    """(variant, its own baseline) where that is not the first one."""
    of_stores: bool = False
    """Its variants are feature stores that a call names."""

    def on_stores(self, stores: Mapping[str, str]) -> "Experiment":
        """Return the table with a variant for each of these addresses, by name."""
        variants = [Variant(name, (*_BEST, f"data.store={url}")) for name, url in stores.items()]
        return replace(self, variants=tuple(variants))

    def as_made(self, names: Iterable[str]) -> "Experiment":
        """Return the table as an earlier call has made it, of variants of these names."""
        return replace(self, variants=tuple(map(Variant, names))) if self.of_stores else self

    def baseline_of(self, name: str) -> str:
        """Name the variant that `name` is compared with."""
        return dict(self.pairs).get(name, self.variants[0].name)


_BEST = ("model.pooling=multi_query",)
_PREVIOUS = Variant("the day before", _BEST, days="previous")


_WIDTHS = (1024, 512, 256, 128, 64, 32, 16)


def _base_nets() -> tuple[tuple[Variant, ...], tuple[tuple[str, str], ...]]:
    nets = {"lr": "LR", "mlp": "Embedding&MLP", "din": "DIN", "dcn": "DCN-v2"}
    variants, pairs = [], []
    for net, title in nets.items():
        for images, text in (("none", "ids only"), ("both", "with images")):
            variants.append(Variant(f"{title}, {text}", (f"model.base={net}", f"model.images={images}", *_BEST)))
        pairs += [(f"{title}, with images", f"{title}, ids only"), (f"{title}, ids only", f"{title}, ids only")]
    return tuple(variants), tuple(pairs)


_NETS, _PAIRS = _base_nets()
_BOTH = Variant("ad and behaviour images", _BEST, 0.6260)
_EXPERIMENTS = (
    Experiment(
        "images",
        "Table 3: which images",
        (
            Variant("ids only", ("model.images=none", *_BEST), 0.6205),
            Variant("ad image", ("model.images=ad", *_BEST), 0.6235),
            Variant("behaviour images", ("model.images=behavior", "model.pooling=attentive"), 0.6219),
            _BOTH,
        ),
        "Image ids are ID fields in all four. With behaviour images alone there is no ad image to ask with: the"
        " ad's IDs ask.",
    ),
    Experiment(
        "aggregators",
        "Table 4: aggregators of behaviour images",
        (
            Variant("concat", ("model.pooling=concat",), 0.6232),
            Variant("max", ("model.pooling=max",), 0.6236),
            Variant("sum", ("model.pooling=sum",), 0.6248),
            Variant("mean", ("model.pooling=mean",)),
            Variant("attentive", ("model.pooling=attentive",), 0.6257),
            Variant("multi-query attentive", _BEST, 0.6260),
            Variant("transformer", ("model.pooling=transformer",)),
        ),
    ),
    Experiment(
        "basenets", "Figure 5: base nets without and with images", _NETS, "Each net compared with itself.", _PAIRS
    ),
    Experiment(
        "warmup",
        "Table 5: warm-up from the day before",
        tuple(
            Variant(name, (*_BEST, f"run.warm_parts={name}"), gauc, days="current", warm=_PREVIOUS)
            for name, gauc in (("none", 0.6260), ("partial", 0.6283), ("full", 0.6230))
        ),
        "The run before learns the days before; partial takes everything but the ID vectors.",
    ),
    Experiment(
        "best",
        "Table 6: all together",
        (
            Variant("ids only", ("model.images=none", *_BEST), 0.6205, days="current"),
            Variant(
                "images, multi-query, partial warm-up",
                (*_BEST, "run.warm_parts=partial"),
                0.6283,
                days="current",
                warm=_PREVIOUS,
            ),
        ),
    ),
    Experiment(
        "prerank",
        "Table 8: two towers for pre-ranking",
        (
            Variant("ids only", ("model.base=two_tower", "model.images=none"), 0.6165),
            Variant("with images", ("model.base=two_tower", "model.images=both"), 0.6225),
        ),
    ),
    Experiment(
        "similarity",
        "Beyond the paper: similarity on the owners, semantic IDs",
        (
            _BOTH,
            Variant("+ SimTier, 16 tiers", (*_BEST, "model.similarity_tiers=16")),
            Variant("only the 8 nearest behaviours", (*_BEST, "model.similarity_top_k=8")),
            Variant("ids + semantic IDs, no images", ("model.images=none", *_BEST), needs_semantic_ids=True),
            Variant("images + semantic IDs", _BEST, needs_semantic_ids=True),
        ),
        "Semantic IDs are codes of a residual quantiser on the store's features (jobs/build_semantic_ids.py).",
    ),
    Experiment(
        "compact",
        "Beyond the paper: compact features",
        (
            Variant("full width", _BEST),
            *(Variant(f"{dims:,} components, bfloat16", _BEST, reduced=(dims, "bfloat16")) for dims in _WIDTHS),
        ),
        "Principal components of the features in data.store (python -m featurestore remake); widths that its rows do"
        " not span are left out.",
    ),
    Experiment(
        "exactness",
        "Beyond the paper: settings that trade exactness for time",
        (
            _BOTH,
            Variant("bfloat16 on the wire", (*_BEST, "exchange.wire_dtype=bfloat16")),
        ),
        "One rank has no wire: the last row says something from two ranks on.",
    ),
    Experiment(
        "encoders",
        "Beyond the paper: encoders and stores",
        (),
        "The same run on each of the stores of --stores, the first of which is the baseline. Bytes are those of the"
        " snapshot's files; seconds of 1,000 images are those of the extraction, where the store has kept them.",
        of_stores=True,
    ),
)


def experiments() -> dict[str, Experiment]:
    """List all experiments by name."""
    return {each.name: each for each in _EXPERIMENTS}


def chosen(names: Sequence[str]) -> list[Experiment]:
    """Choose the experiments of these names, or all for "all", in the order of the paper."""
    known = experiments()
    return [each for name, each in known.items() if name in names or "all" in names]
