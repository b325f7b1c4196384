"""A picture that a person names, in the place of an ad's: of the run's snapshot, or of the store's newest one."""

from explorer.data.images.finding import find_key
from explorer.data.impressions.explained import OtherPicture, Score, has_feature, with_other_pictures
from explorer.data.impressions.groups import PictureName, SampleGroup
from explorer.data.impressions.sent import check_kind, with_look
from explorer.errors import ExplorerError, NotHereError
from featurestore.store import FeatureStore


def score_typed(group: SampleGroup, ad: int, picture: PictureName, store: str | None) -> OtherPicture:
    """Score an ad with a picture of the store; one that came after the training has the feature of the newest snapshot.

    `store`: the store that is shown, for runs that have none. Reads one shard's names, and one feature. Raises
    NotHereError where neither snapshot has it; ExplorerError where the run cannot take a newer one; FeatureStoreError.
    """
    opened, looks = group.columns.opened, group.columns.looks_of_ads
    if looks and has_feature(opened, looks, [picture])[0]:
        return with_other_pictures(group, ad, [picture])[0]
    fields = [field.store_name for field in opened.trained.engine.fields if field.name in looks]
    url = opened.trained.stores[fields[0]].url if fields else store or opened.trained.config.data.store
    newest = FeatureStore.open(url)
    snapshot = newest.snapshot()
    if find_key(snapshot, picture.key) is None:
        raise NotHereError("there is no image of that name in the store, so no score")
    if not looks:
        return with_other_pictures(group, ad, [picture])[0]
    model = opened.trained.config.model
    if model.similarity_tiers or model.similarity_top_k:
        raise ExplorerError(
            "this picture is newer than the training, and the run also compares the ad's picture with those of the "
            "history: look all images up in the newest snapshot (snapshot=newest in the address)"
        )
    check_kind(opened, looks, newest)
    feature_1K = snapshot.get([picture.key])
    row = group.of_ad(ad)
    changed = group.with_pictures(row, [picture])
    as_it_is = group.with_pictures(row, group.ad_pictures[ad][:1])
    return OtherPicture(
        picture=picture,
        score=Score(float(with_look(group, changed, feature_1K)[0])),
        look_alone=Score(float(with_look(group, as_it_is, feature_1K)[0])),
        has_feature=True,
        newer=snapshot.version,
    )
