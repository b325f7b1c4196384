"""Sharded, versioned features of images: the store, and one rank's partition of it.

Letters of shapes, as suffixes of array names: P ranks, N rows, M live rows, U unique keys asked, D feature width.
The service that turns features into visual vectors is in `featurestore.lookup.embedding`, which imports torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featurestore.flight.client import FeatureClient, connect
    from featurestore.format.codec import Codec, FeatureStatistics
    from featurestore.format.datafile import FeatureRows, to_bits, to_float32
    from featurestore.keys import key_of_uri, keys_of_uris, owner_of, shard_of
    from featurestore.lookup.hashedrows import Lookup
    from featurestore.lookup.partition import FeaturePartition
    from featurestore.spec import ExtractorSpec, StoreInfo
    from featurestore.staging import QuarantineRow
    from featurestore.store import FeatureStore, Snapshot

__all__ = [
    "Codec",
    "ExtractorSpec",
    "FeatureClient",
    "FeaturePartition",
    "FeatureRows",
    "FeatureStatistics",
    "FeatureStore",
    "Lookup",
    "QuarantineRow",
    "Snapshot",
    "StoreInfo",
    "connect",
    "key_of_uri",
    "keys_of_uris",
    "owner_of",
    "shard_of",
    "to_bits",
    "to_float32",
]

_MODULES = (
    "format.codec", "format.datafile", "keys", "lookup.hashedrows", "lookup.partition", "spec", "staging", "store",
)  # fmt: skip
_CLIENT, _OF_CLIENT = "flight.client", ("FeatureClient", "connect")  # nobody else needs to load Arrow Flight


def __getattr__(name: str) -> Any:
    """Load the public names when the first of them is asked for: a command's --help needs none of them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in (_CLIENT,) if name in _OF_CLIENT else _MODULES:
        here = vars(importlib.import_module(f"{__name__}.{module}"))
        globals().update({each: here[each] for each in __all__ if each in here})
    return globals()[name]
