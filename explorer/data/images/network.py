"""The network that made a store's features, built again on this machine for a picture that somebody brings.

Nothing is downloaded and nothing of the picture is written to the disk.
Letters of shapes: D width of the network's features, K of the store's rows.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from explorer.errors import ExplorerError
from featurestore.errors import UserError
from featurestore.spec import StoreInfo
from featurestore.store import FeatureStore

if TYPE_CHECKING:
    from pipeline.network.backbone import Backbone

MOST_BYTES = 10_000_000
"""Of a picture that somebody brings."""


def why_not(info: StoreInfo) -> str:
    """Say in a sentence why the store's network cannot be built here; empty where it may. Reads no weights."""
    if info.network is None:
        return "The store does not say which network made its features: they were imported."
    weights = info.network.weights
    if weights.startswith("random:"):
        return ""
    if weights.startswith("imagenet"):
        found = _downloaded_weights(info.network.backbone, weights)
        missing = f"The weights {weights} of {info.network.backbone} are not in this machine's cache of torch"
        return "" if found else f"{missing}; nothing is downloaded here."
    return "" if Path(weights).is_file() else f"The weights {weights} are not on this machine."


def feature_of_picture(store: FeatureStore, data: bytes) -> npt.NDArray[Any]:
    """Compute the feature of a picture by the store's own network, (1, K) as the store keeps it.

    Raises ExplorerError where the network cannot be built here or is another one, BadImageError for what is no picture.
    """
    from pipeline.images.decode import prepare

    if problem := why_not(store.info):
        raise ExplorerError(problem)
    network = _network(store.info)
    pixels = prepare(data, network.preset)
    feature_1D = network.features(np.array(pixels.pixels_HWC)[None])
    return store.codec.encode(store.project(feature_1D))


def _network(info: StoreInfo) -> "Backbone":
    from pipeline.network.backbone import backbone

    assert info.network is not None
    compute_dtype: Any = info.extractor.compute_dtype
    try:
        network = backbone(info.network.backbone, info.network.weights, compute_dtype)
    except UserError as error:
        raise ExplorerError(f"The store's network cannot be built on this machine: {error}") from error
    if network.spec != info.extractor:
        mine, theirs = network.spec.model_dump(), info.extractor.model_dump()
        differing = ", ".join(name for name in mine if mine[name] != theirs[name])
        raise ExplorerError(
            f"The network {info.network.backbone} with weights {info.network.weights} is another one on this machine "
            f"than when the store was made: {differing} differ"
        )
    return network


def _downloaded_weights(backbone: str, weights: str) -> bool:
    import torch

    from pipeline.network.layers import network_of

    try:
        url = network_of(backbone, weights).weights_entry.url
    except UserError:
        return False
    return bool((Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]).is_file())
