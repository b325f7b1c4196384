"""Uris of pictures by key, read out of the stores that a run looks images up in; those found are kept."""

from collections import OrderedDict
from collections.abc import Iterable
from threading import Lock

import numpy as np

from explorer.data.images.finding import Found, find_part
from explorer.data.impressions.groups import PictureName
from explorer.data.impressions.opened import OpenedRun
from featurestore.errors import FeatureStoreError
from featurestore.keys import shard_of
from featurestore.store import FeatureStore

_MOST_KEPT = 50_000


class PictureNames:
    """Names of pictures, for several threads; at most _MOST_KEPT are kept."""

    def __init__(self, store: str | None) -> None:
        """`store`: where pictures are looked for that a run's own snapshot does not have."""
        self._store, self._lock = store, Lock()
        self._kept: OrderedDict[tuple[str, int], str] = OrderedDict()

    def of(self, opened: OpenedRun, store_name: str, pictures: Iterable[PictureName]) -> dict[int, str]:
        """Find the uri of each key: that of the samples, of the run's snapshot, or of the newest one.

        Reads keys and uris of the shards that the unknown ones are in. A key that no store has is left out.
        """
        found: dict[int, str] = {}
        wanted = set()
        for picture in pictures:
            if picture.uri is not None:
                found[picture.key] = picture.uri
            else:
                wanted.add(picture.key)
        record = opened.trained.stores.get(store_name)
        places: list[tuple[str, int | None]] = [(record.url, record.version)] if record else []
        if self._store is not None:
            places.append((self._store, None))
        for url, version in places:
            if missing := wanted - found.keys():
                found |= self._look_up(url, version, missing)
        return found

    def with_part(self, opened: OpenedRun, part: str) -> Found | None:
        """Find pictures whose uri has a part in it, in the run's snapshot, else in the newest of the shown store.

        Bounded as a search of images is. None where the run has no store, and none is shown. Raises FeatureStoreError.
        """
        field = next(opened.schema.of_kind("content"), None)
        record = opened.trained.stores.get(field.store_name) if field else None
        if record is not None:
            return find_part(FeatureStore.open(record.url).snapshot(record.version), part)
        return find_part(FeatureStore.open(self._store).snapshot(), part) if self._store is not None else None

    def _look_up(self, url: str, version: int | None, keys: set[int]) -> dict[int, str]:
        with self._lock:
            found = {key: self._kept[url, key] for key in keys if (url, key) in self._kept}
        if asked := sorted(keys - found.keys()):
            try:
                found |= self._keep(url, _read(url, version, asked))
            except FeatureStoreError:  # a name is a comfort: without it pages show the key
                return found
        return found

    def _keep(self, url: str, found: dict[int, str]) -> dict[int, str]:
        with self._lock:
            for key, uri in found.items():
                self._kept[url, key] = uri
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return found


def _read(url: str, version: int | None, keys: list[int]) -> dict[int, str]:
    store = FeatureStore.open(url)
    snapshot = store.snapshot(version)
    key_U = np.asarray(keys, np.int64)
    shard_U = shard_of(key_U, store.info.num_shards)
    found: dict[int, str] = {}
    for shard in np.unique(shard_U):
        have_K, uris = snapshot.shard_reader(int(shard)).uris(key_U[shard_U == shard])
        found |= dict(zip(have_K.tolist(), uris, strict=True))
    return found
