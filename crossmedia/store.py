"""Features of images by name: a store at one of its snapshots."""

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from featurestore import FeatureStore, Snapshot
from featurestore.keys import keys_of_images
from featurestore.text import Shown

if TYPE_CHECKING:
    import pandas as pd

    from crossmedia.datasets import FeatureDataset


def open_store(url: str | os.PathLike[str], version: int | str | None = None) -> "Store":
    """Open a feature store at its newest snapshot, or at that of a version or channel. Raises FeatureStoreError."""
    store = FeatureStore.open(url)
    return Store(store, store.snapshot(version))


class Store(Shown):
    """A feature store at one snapshot, as a mapping from images to features.

    `store["bag/1.jpg"]` is float32 (D,), `store[["bag/1.jpg", "bag/2.jpg"]]` float32 (U, D); images are uris or keys.
    What the store can do beyond that, `featurestore` has: `store.snapshot` and `store.features`.
    """

    def __init__(self, features: FeatureStore, snapshot: Snapshot) -> None:
        self.features, self.snapshot = features, snapshot

    @property
    def url(self) -> str:
        """The store's address."""
        return self.features.url

    @property
    def version(self) -> int:
        """The version of the snapshot."""
        return self.snapshot.version

    def __len__(self) -> int:
        """Count the images."""
        return self.snapshot.num_rows

    def __contains__(self, image: object) -> bool:
        """Tell whether an image has a feature."""
        return bool(self.snapshot.contains(keys_of_images([image]))[0])

    def __getitem__(self, images: Any) -> NDArray[np.float32]:
        """Read the feature of an image, (D,), or of several, (U, D). Raises MissingKeysError."""
        is_one = isinstance(images, str | int | np.integer)
        values_UD = self.snapshot.codec.decode(self.snapshot.get(keys_of_images([images] if is_one else images)))
        feature: NDArray[np.float32] = values_UD[0] if is_one else values_UD
        return feature

    def to_arrow(self) -> pa.Table:
        """Read all images with their uris and features."""
        return self.snapshot.to_arrow()

    def to_pandas(self) -> "pd.DataFrame":
        """Read all images with their uris and features."""
        return self.to_arrow().to_pandas()

    def dataset(self, cache_dir: str | None = None) -> "FeatureDataset":
        """Make a torch Dataset of the snapshot."""
        from crossmedia.datasets import FeatureDataset

        return FeatureDataset(self.url, self.version, cache_dir)

    def _about(self) -> tuple[str, dict[str, Any]]:
        info = self.features.info
        return self.url, {"rows": len(self), "version": self.version, "dim": info.dim, "dtype": info.dtype}
