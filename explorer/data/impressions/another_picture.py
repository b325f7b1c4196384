"""Scores of an ad with another picture: one from the store, by its key, or an uploaded one."""

from collections.abc import Iterable
from typing import Any

import numpy.typing as npt

from explorer.data.cache import LruCache
from explorer.data.images.rows import Found, find_key, find_part
from explorer.data.images.visual import feature_of_picture
from explorer.data.impressions.explained import OtherPicture, Score, has_feature, with_other_pictures
from explorer.data.impressions.groups import PictureName, Row, SampleGroup
from explorer.data.impressions.open_runs import Logits, OpenedRun
from explorer.data.store.snapshots import named
from explorer.errors import ExplorerError, NotHereError
from featurestore.errors import FeatureStoreError
from featurestore.store import FeatureStore

_MOST_NAMES = 50_000


class PictureNames:
    """Names of pictures; caches at most _MOST_NAMES. Thread-safe."""

    def __init__(self, store: str | None) -> None:
        """`store`: fallback for pictures that a run's own snapshot does not have."""
        self._store = store
        self._names: LruCache[str] = LruCache(_MOST_NAMES)

    def of(self, opened: OpenedRun, store_name: str, pictures: Iterable[PictureName]) -> dict[int, str]:
        """Find the uri of each key: that of the samples, of the run's snapshot, or of the newest one.

        Reads keys and uris of the shards of unknown ones. Leaves out keys that no store has.
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
        """Find pictures whose uri contains a text, in the run's snapshot, else in the newest one of the shown store.

        Limited like the search of images. None if there is neither store. Raises FeatureStoreError.
        """
        field = next(opened.schema.of_kind("content"), None)
        record = opened.trained.stores.get(field.store_name) if field else None
        if record is not None:
            return find_part(FeatureStore.open(record.url).snapshot(record.version), part)
        return find_part(FeatureStore.open(self._store).snapshot(), part) if self._store is not None else None

    def _look_up(self, url: str, version: int | None, keys: set[int]) -> dict[int, str]:
        found = {key: uri for key in keys if (uri := self._names.peek((url, key))) is not None}
        if asked := sorted(keys - found.keys()):
            try:
                images = named(FeatureStore.open(url).snapshot(version), asked)
            except FeatureStoreError:  # names are optional: without one, pages show the key
                return found
            for image in images:
                self._names.put((url, image.key), image.uri)
            found |= {image.key: image.uri for image in images}
        return found


def score_sent(group: SampleGroup, ad: int, store: FeatureStore, picture: bytes) -> Score:
    """Score an ad with the visual vectors of an uploaded picture and its own IDs.

    Raises ExplorerError if the run sees no pictures of ads, or was trained on features of another kind than those of
    the store's network; BadImageError.
    """
    opened = group.columns.opened
    check_sent(opened, group.columns.looks_of_ads, store)
    feature_1K = feature_of_picture(store, picture)
    return Score(float(with_look(group, group.of_ad(ad), feature_1K)[0]))


def check_sent(opened: OpenedRun, looks: tuple[str, ...], store: FeatureStore) -> None:
    """Raise ExplorerError if a run cannot score an uploaded picture."""
    from trainer.runs.open import other_features

    if not looks:
        raise ExplorerError(f"the run {opened.name} sees no pictures of ads")
    names = {field.store_name for field in opened.trained.engine.fields if field.name in looks}
    for name in names:
        if other_features(store.info, opened.trained.saved.state, name):
            raise ExplorerError(f"the run {opened.name} was trained on features of another kind than {store.url} has")


def with_look(group: SampleGroup, row: Row, feature_1K: npt.NDArray[Any]) -> Logits:
    """Predict the only ad of a row, (1,), with visual vectors computed from this stored feature."""
    import torch

    from featurestore.lookup.ondevice import as_tensor
    from trainer.engine.wiring import model_name
    from trainer.exchange.vectors import FieldVectors

    trained, looks = group.columns.opened.trained, group.columns.looks_of_ads
    engine, config = trained.engine, trained.config.model
    zero_1, one_1 = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    visual = {
        field.name: FieldVectors(
            engine.services[field.store_name].models[model_name(field, config)](as_tensor(feature_1K)), zero_1, one_1
        )
        for field in engine.fields
        if field.name in looks
    }
    prepared = engine.prepare(group.batch([row]), "eval")
    return engine.compute(prepared, engine.model, visual)


def score_chosen(group: SampleGroup, ad: int, picture: PictureName, store: str | None) -> OtherPicture:
    """Score an ad with a picture of the snapshot in which the run looks images up.

    `store`: the shown store, for runs that see no images of ads. Reads one shard's names. Raises NotHereError if the
    snapshot does not have the picture; FeatureStoreError.
    """
    opened, looks = group.columns.opened, group.columns.looks_of_ads
    if looks:
        is_there = has_feature(opened, looks, [picture])[0]
    else:
        snapshot = FeatureStore.open(store or opened.trained.config.data.store).snapshot()
        is_there = find_key(snapshot, picture.key) is not None
    if not is_there:
        raise NotHereError("there is no image of that name in the store at the run's snapshot, so no score")
    return with_other_pictures(group, ad, [picture])[0]
