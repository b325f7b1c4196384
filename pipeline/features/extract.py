"""Images to features, once per image: a refresh that makes the store when it is new and keeps what is not listed."""

import time
from dataclasses import dataclass
from typing import Any, Literal, cast

from distributed import Client

from featurestore.errors import StoreNotFoundError
from featurestore.spec import DType, ExtractorSpec, NetworkName, StoreInfo
from featurestore.store import FeatureStore
from pipeline.cluster.checks import wait_for_workers
from pipeline.errors import ExtractionError
from pipeline.features.refresh import WORKERS_TIMEOUT_S, RefreshOptions, bring_up_to_date
from pipeline.features.summary import RefreshSummary
from pipeline.images.source import list_images
from pipeline.network.backbone import ComputeDType
from pipeline.network.compute_dtype import describe_network
from pipeline.network.layers import DEFAULT_BACKBONE, feature_dim
from pipeline.network.weights import check_weights_name, warn_if_untrained

NEW_INT8 = (
    "{store} would be a new store in int8, whose codec is trained on features that are there: make a bfloat16 store"
    " first, and the int8 store of it with `python -m featurestore recode`; that one takes new rows too"
)


@dataclass(frozen=True)
class ExtractOptions:
    """What to extract, and how. `num_shards` and `name` count when the store is made."""

    images: str
    store: str
    weights: str = "imagenet"
    dtype: DType | None = None  # as the store has it; bfloat16 in a new one
    compute_dtype: ComputeDType | Literal["auto"] = "auto"
    batch_size: int = 16
    part_size: int = 256
    num_shards: int | None = None
    name: str | None = None
    backbone: str = DEFAULT_BACKBONE  # MODEL:LAYER


def extract(options: ExtractOptions, client: Client) -> RefreshSummary:
    """As `pipeline.features.refresh.refresh`, but the store is made when it is new, and rows of other images stay.

    Raises SourceError, WeightsError, SpecMismatchError, ExtractionError, ClusterError and the errors of storage; what
    was staged by then stays for the next run. Random weights give an UntrainedWeightsWarning.
    """
    start_s = time.monotonic()
    num_shards = options.num_shards
    if num_shards is not None and (num_shards < 1 or num_shards & (num_shards - 1)):
        raise ExtractionError(f"num_shards={num_shards} is not a power of two; try 64 or 128")
    weights = check_weights_name(options.weights)
    warn_if_untrained(weights)
    listing = list_images(options.images)
    wait_for_workers(client, str(client.scheduler_info()["address"]), 1, WORKERS_TIMEOUT_S)
    spec = describe_network(client, options.backbone, weights, options.compute_dtype)
    refreshed = RefreshOptions(
        options.images,
        options.store,
        weights,
        cast("ComputeDType", spec.compute_dtype),
        options.batch_size,
        options.part_size,
        options.backbone,
        keep_missing=True,
    )
    return bring_up_to_date(refreshed, client, open_store(options, weights, spec), listing, "extract", start_s)


def open_store(options: ExtractOptions, weights: str, spec: ExtractorSpec) -> FeatureStore:
    """The store, made when it is new. Raises SpecMismatchError when it is of another network, dtype or layout."""
    given = {"num_shards": options.num_shards, "name": options.name, "dtype": options.dtype}
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    changed |= {"dim": feature_dim(options.backbone, weights), "extractor": spec}
    network = NetworkName(backbone=options.backbone, weights=weights)
    try:
        store = FeatureStore.open(options.store)
    except StoreNotFoundError:
        if options.dtype == "int8":
            raise ExtractionError(NEW_INT8.format(store=options.store)) from None
        return FeatureStore.open_or_create(options.store, StoreInfo.model_validate(changed | {"network": network}))
    store.info.model_copy(update=changed).check_same(store.info, f"the store at {store.url}")
    return store
