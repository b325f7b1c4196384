"""Images to features, once per image: a refresh that makes the store when it is new and keeps what is not listed."""

import time
from typing import cast

from distributed import Client

from featurestore.lookup.compute_dtype import AutoDType
from featurestore.spec import NetworkName
from featurestore.store import Reduction
from pipeline.errors import StoreRunError
from pipeline.features.refresh import RefreshSummary, bring_up_to_date, check_channel
from pipeline.images.source import list_images
from pipeline.network.described import check_weights_name, describe_network
from pipeline.network.layers import feature_dim
from pipeline.network.weights import warn_if_untrained
from pipeline.options import ExtractOptions, RefreshOptions
from pipeline.store_run import open_or_make, wait_for_worker


def extract(options: ExtractOptions, client: Client) -> RefreshSummary:
    """Do as `pipeline.features.refresh.refresh`, but make a new store, and keep the rows of other images.

    Raises SourceError, WeightsError, SpecMismatchError, StoreRunError, ClusterError and the errors of storage; what
    was staged by then stays for the next run. A compact store is made by the basis of `options.reduce`, and keeps its
    own basis without the option. Random weights give an UntrainedWeightsWarning.
    """
    start_s = time.monotonic()
    check_channel(options.channel)
    num_shards = options.num_shards
    if num_shards is not None and (num_shards < 1 or num_shards & (num_shards - 1)):
        raise StoreRunError(f"num_shards={num_shards} is not a power of two; try 64 or 128")
    weights = check_weights_name(options.weights)
    warn_if_untrained(weights)
    reduction = None if options.reduce is None else Reduction.at(options.reduce)
    listing = list_images(options.images)
    wait_for_worker(client)
    spec = describe_network(client, options.backbone, weights, options.compute_dtype)
    asked = {
        "num_shards": num_shards,
        "name": options.name,
        "dtype": options.dtype,
        "dim": feature_dim(options.backbone, weights),
        "extractor": spec,
    }
    network = NetworkName(backbone=options.backbone, weights=weights)
    store = open_or_make(options.store, asked, reduction, network=network)
    refreshed = RefreshOptions(
        images=options.images,
        store=options.store,
        backbone=options.backbone,
        weights=weights,
        compute_dtype=cast("AutoDType", spec.compute_dtype),
        batch_size=options.batch_size,
        part_size=options.part_size,
        keep_missing=True,
        channel=options.channel,
    )
    return bring_up_to_date(refreshed, client, store, listing, "extract", start_s)
