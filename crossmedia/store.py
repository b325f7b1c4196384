"""Features of images by name: a store at one of its snapshots."""

import os
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featurestore import FeatureStore, Snapshot
from featurestore.keys import keys_of_images

if TYPE_CHECKING:
    import pandas as pd

    from crossmedia.datasets import FeatureDataset


def open_store(url: str | os.PathLike[str], version: int | str | None = None) -> "Store":
    """Open a feature store at its newest snapshot, or at that of a version or channel. Raises FeatureStoreError."""
    snapshot = FeatureStore.open(url).snapshot(version)
    return Store(snapshot.storage, snapshot.info, snapshot.manifest)


class Store(Snapshot):
    """A snapshot of a feature store as a mapping from images to features.

    `store["bag/1.jpg"]` is float32 (D,), `store[["bag/1.jpg", "bag/2.jpg"]]` float32 (U, D); images are uris or keys.
    It can do all that a `featurestore.Snapshot` can.
    """

    def __len__(self) -> int:
        """Count the images."""
        return self.num_rows

    def __contains__(self, image: object) -> bool:
        """Return whether an image has a feature."""
        return bool(self.contains(keys_of_images([image]))[0])

    def __getitem__(self, images: Any) -> NDArray[np.float32]:
        """Read the feature of an image, (D,), or of several, (U, D). Raises MissingKeysError."""
        is_one = isinstance(images, str | int | np.integer)
        asked_U = [images] if is_one else images
        values_UD = self.codec.decode(self.get(keys_of_images(asked_U), asked_U))
        feature: NDArray[np.float32] = values_UD[0] if is_one else values_UD
        return feature

    def to_pandas(self) -> "pd.DataFrame":
        """Read all images with their uris and features."""
        return self.to_arrow().to_pandas()

    def dataset(self, cache_dir: str | None = None) -> "FeatureDataset":
        """Make a torch Dataset of the snapshot."""
        from crossmedia.datasets import FeatureDataset

        return FeatureDataset(self.storage.url, self.version, cache_dir)

    def _about(self) -> tuple[str, dict[str, Any]]:
        values = {"rows": len(self), "version": self.version, "dim": self.info.dim, "dtype": self.info.dtype}
        return self.storage.url, values
