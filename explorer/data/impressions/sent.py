"""A picture that somebody sends, in the place of an ad's: through the store's network and the run's E, kept nowhere."""

from typing import Any

import numpy.typing as npt

from explorer.data.images.network import feature_of_picture
from explorer.data.impressions.explained import Score
from explorer.data.impressions.groups import Row, SampleGroup
from explorer.data.impressions.opened import Logits, OpenedRun
from explorer.errors import ExplorerError
from featurestore.store import FeatureStore


def score_sent(group: SampleGroup, ad: int, store: FeatureStore, picture: bytes) -> Score:
    """Score an ad with the look of a picture and its IDs as they are.

    Raises ExplorerError where the run sees no pictures of ads, compares pictures with each other, or was trained on
    features of another kind than the store's network makes; BadImageError.
    """
    opened = group.columns.opened
    check_sent(opened, group.columns.looks_of_ads, store)
    feature_1K = feature_of_picture(store, picture)
    return Score(float(with_look(group, group.of_ad(ad), feature_1K)[0]))


def check_sent(opened: OpenedRun, looks: tuple[str, ...], store: FeatureStore) -> None:
    """Raise ExplorerError where a picture cannot be sent to a run."""
    config = opened.trained.config.model
    if not looks:
        raise ExplorerError(f"the run {opened.name} sees no pictures of ads")
    if config.similarity_tiers or config.similarity_top_k:
        raise ExplorerError(
            f"the run {opened.name} also compares the ad's picture with those of the history, which needs a picture "
            "that the store has: choose one by its key or uri"
        )
    check_kind(opened, looks, store)


def check_kind(opened: OpenedRun, looks: tuple[str, ...], store: FeatureStore) -> None:
    """Raise ExplorerError where the store's features are of another kind than those that the run was trained on."""
    from trainer.runs.stores import other_features

    names = {field.store_name for field in opened.trained.engine.fields if field.name in looks}
    for name in names:
        if other_features(store.info, opened.trained.saved.state, name):
            raise ExplorerError(f"the run {opened.name} was trained on features of another kind than {store.url} has")


def with_look(group: SampleGroup, row: Row, feature_1K: npt.NDArray[Any]) -> Logits:
    """Predict the only ad of a row, (1,), its visual vectors made of this feature as the store keeps it."""
    import torch

    from featurestore.lookup.embedding import as_tensor
    from trainer.engine.engine import model_name
    from trainer.exchange.exchange import FieldVectors

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
