"""Sharded, versioned features of images: the store, and one rank's partition of it.

Letters of shapes, as suffixes of array names: P ranks, N rows, M live rows, U unique keys asked, D feature width.
The service that turns features into visual vectors is in `featurestore.lookup.embedding`; it alone imports torch.
"""

from featurestore.format.codec import Codec
from featurestore.format.rows import FeatureRows, to_bits, to_float32
from featurestore.format.statistics import FeatureStatistics
from featurestore.keys import key_of_uri, keys_of_uris, owner_of, shard_of
from featurestore.lookup.partition import FeaturePartition, Lookup
from featurestore.quarantine import QuarantineRow
from featurestore.snapshot import Snapshot
from featurestore.spec import CodecSpec, ExtractorSpec, StoreInfo
from featurestore.store import FeatureStore

__all__ = [
    "Codec",
    "CodecSpec",
    "ExtractorSpec",
    "FeaturePartition",
    "FeatureRows",
    "FeatureStatistics",
    "FeatureStore",
    "Lookup",
    "QuarantineRow",
    "Snapshot",
    "StoreInfo",
    "key_of_uri",
    "keys_of_uris",
    "owner_of",
    "shard_of",
    "to_bits",
    "to_float32",
]
