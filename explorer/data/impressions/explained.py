"""Explanations of the scores of a group: without images or behaviours, with other pictures, and sentences about them.

Letters of shapes: C ads of the group, L behaviours, K pictures that replace the ad's.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from explorer.data.cache import LruCache
from explorer.data.impressions.groups import GroupColumns, PictureName, SampleGroup, with_looks, without_pictures
from explorer.data.impressions.open_runs import OpenedRun
from explorer.data.snapshots import find_key, named
from explorer.data.visual import feature_of_picture
from explorer.errors import ExplorerError, NotHereError
from explorer.problems import Problem
from featurestore.errors import FeatureStoreError
from featurestore.store import FeatureStore

if TYPE_CHECKING:
    from trainer.models.pooling import PairWeights


MOST_BEHAVIORS = 200
"""Number of behaviours whose effect is computed, the newest ones."""
_MOST_NAMES = 50_000
CHANNELS = {"images": "by the ad's picture", "ids": "by the ad's IDs"}


@dataclass(frozen=True)
class Score:
    """A score, as the model's logit and as a click probability."""

    logit: float

    @property
    def probability(self) -> float:
        """The click probability of the score."""
        return 1 / (1 + math.exp(-self.logit)) if self.logit > -700 else 0.0


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An ad of the group, and its scores."""

    place: int
    ad: str
    picture: PictureName | None
    clicked: bool
    score: Score
    without_images: Score
    """The same trained run, every image missing."""
    ids_alone: Score | None
    """The score of a run of IDs only, if one was given."""
    rank: int
    rank_without: int
    """Rank among the ads of the group, from 1."""

    @property
    def effect(self) -> float:
        """What the images add to the click probability."""
        return self.score.probability - self.without_images.probability


@dataclass(frozen=True, kw_only=True)
class Behavior:
    """A behaviour of the user, its weights for the ad, and its effect on the ad's score."""

    place: int
    picture: PictureName
    weights: tuple[float, ...]
    """Weights by `Explanation.channels`; empty if the behaviour has none."""
    without_picture: Score | None
    """Score of the ad with this picture removed from the history, but with all IDs; None: the model sees no pictures of
    behaviours."""
    without_it: Score
    """Score of the ad for a user without this behaviour."""


@dataclass(frozen=True, kw_only=True)
class OtherPicture:
    """The scores of the ad with another picture."""

    picture: PictureName
    score: Score
    """Score with the visual vectors and the ID of this picture, as in real samples."""
    look_alone: Score | None
    """Score with the picture's visual vectors and the ad's own IDs; None: the model sees no pictures of ads."""
    has_feature: bool
    """Whether the picture has a feature; else it counts as a missing image."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A sample group and one of its ads, explained by one run."""

    group: SampleGroup
    candidates: list[Candidate]
    chosen: Candidate
    behaviors: list[Behavior]
    num_behaviors: int
    channels: tuple[str, ...]
    """Names of the columns of the behaviours' weights."""

    def effect(self, behavior: Behavior) -> float | None:
        """Return the effect of a behaviour's picture on the ad's click probability."""
        if behavior.without_picture is None:
            return None
        return self.chosen.score.probability - behavior.without_picture.probability

    def effect_of_all(self, behavior: Behavior) -> float:
        """Return the effect of the whole behaviour on the ad's click probability."""
        return self.chosen.score.probability - behavior.without_it.probability

    @property
    def helped_most(self) -> Behavior | None:
        """The behaviour whose picture raises the score most, or None."""
        return self._extreme(1)

    @property
    def hurt_most(self) -> Behavior | None:
        """The behaviour whose picture lowers the score most, or None."""
        return self._extreme(-1)

    def _extreme(self, sign: int) -> Behavior | None:
        found = [(sign * effect, each) for each in self.behaviors if (effect := self.effect(each)) is not None]
        best, behavior = max(found, key=lambda pair: pair[0], default=(0.0, None))
        return behavior if best > 0 else None


def explain(
    opened: OpenedRun,
    number: int,
    ad: int | None = None,
    ids_run: OpenedRun | None = None,
    *,
    most_behaviors: int = MOST_BEHAVIORS,
) -> Explanation:
    """Explain the score of an ad of sample group `number`, by default of the ad that images affect most.

    One batch has a copy of the group for each behaviour, without it and with this ad alone. `ids_run`: a run of IDs
    only, which scores the ads too. Raises NotHereError, DataError.
    """
    columns = GroupColumns(opened)
    group = columns.read(number)
    candidates = _candidates(group, ids_run)
    if ad is None:
        chosen = max(candidates, key=lambda each: abs(each.effect))
    elif 0 <= ad < len(candidates):
        chosen = candidates[ad]
    else:
        raise NotHereError(Problem.NO_AD, ad, len(candidates))
    behaviors, weights = _behaviors(group, chosen.place, most_behaviors)
    return Explanation(
        group=group,
        candidates=candidates,
        chosen=chosen,
        behaviors=behaviors,
        num_behaviors=len(group.behavior_pictures),
        channels=tuple(CHANNELS[each] for each in opened.trained.engine.model.query_sources) if weights else (),
    )


def with_other_pictures(group: SampleGroup, ad: int, pictures: Sequence[PictureName]) -> list[OtherPicture]:
    """Score an ad with each of these pictures instead of its own, in one batch, (K). Raises DataError."""
    if not pictures:
        return []
    opened, row = group.columns.opened, group.of_ad(ad)
    changed = group.batch([group.with_pictures(row, pictures)])
    logit_K = opened.logits(changed)
    looks = group.columns.looks_of_ads
    look_K: Sequence[float | None] = [None] * len(pictures)
    if looks:
        as_it_is = group.batch([group.with_pictures(row, [group.ad_pictures[ad]] * len(pictures))])
        look_K = opened.logits(with_looks(as_it_is, changed, looks)).tolist()
    has_K = has_feature(opened, looks, pictures)
    return [
        OtherPicture(
            picture=picture, score=Score(score), look_alone=None if look is None else Score(look), has_feature=has
        )
        for picture, score, look, has in zip(pictures, logit_K.tolist(), look_K, has_K, strict=True)
    ]


def _candidates(group: SampleGroup, ids_run: OpenedRun | None) -> list[Candidate]:
    opened = group.columns.opened
    batch = group.batch([group.row])
    logit_C, without_C = opened.logits(batch), opened.logits_without_images(batch)
    ids_C: Sequence[float | None] = [None] * len(logit_C)
    if ids_run is not None:
        same = GroupColumns(ids_run).read(group.number)  # by the columns of its own schema
        ids_C = ids_run.logits(same.batch([same.row])).tolist()
    pictures: Sequence[PictureName | None] = group.ad_pictures or [None] * len(logit_C)
    return [
        Candidate(
            place=place,
            ad=ad,
            picture=pictures[place],
            clicked=label == 1,
            score=Score(logit),
            without_images=Score(without),
            ids_alone=None if ids is None else Score(ids),
            rank=1 + int((logit_C > logit).sum()),
            rank_without=1 + int((without_C > without).sum()),
        )
        for place, (ad, label, logit, without, ids) in enumerate(
            zip(group.ads, group.labels, logit_C.tolist(), without_C.tolist(), ids_C, strict=True)
        )
    ]


def _behaviors(group: SampleGroup, ad: int, most: int) -> tuple[list[Behavior], bool]:
    """Score the ad without each behaviour; return also whether the run's aggregator weighs them."""
    columns, opened = group.columns, group.columns.opened
    row = group.of_ad(ad)
    pictures = group.behavior_pictures[:most]
    num = len(pictures)
    if num == 0:
        return [], False
    alone = group.batch([row])
    weights = _weights(opened.weights(alone), columns, num)
    without_L = opened.logits(group.batch([group.without_behavior(row, place) for place in range(num)]))
    picture_L: Sequence[float | None] = [None] * num
    if fields := columns.pictures_of_behaviors:
        copies = without_pictures(group.batch([row] * num), fields, np.arange(num))
        picture_L = opened.logits(copies).tolist()
    behaviors = [
        Behavior(
            place=place,
            picture=pictures[place],
            weights=tuple(weights[place]) if weights is not None else (),
            without_picture=None if of_picture is None else Score(of_picture),
            without_it=Score(of_all),
        )
        for place, (of_picture, of_all) in enumerate(zip(picture_L, without_L.tolist(), strict=True))
    ]
    return behaviors, weights is not None


def _weights(noted: dict[str, "PairWeights"], columns: GroupColumns, num: int) -> list[list[float]] | None:
    """Return the weights of the first `num` behaviours of the only sample, one list per behaviour, or None."""
    name = next((each for each in columns.pictures_of_behaviors if each in noted), None)
    if name is None:
        return None
    weights: list[list[float]] = noted[name].weight_NC[:num].tolist()
    return weights


def has_feature(opened: OpenedRun, looks: Sequence[str], pictures: Sequence[PictureName]) -> list[bool]:
    """Return a mask of the pictures that the run's snapshot has."""
    fields = [field for field in opened.trained.engine.fields if field.name in looks]
    if not fields:
        return [True] * len(pictures)
    partition = opened.trained.partitions[fields[0].store_name]
    found: list[bool] = partition.contains(np.asarray([each.key for each in pictures], np.int64)).tolist()
    return found


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
    import torch

    from featurestore.lookup.ondevice import as_tensor
    from trainer.exchange.vectors import FieldVectors

    opened, looks = group.columns.opened, group.columns.looks_of_ads
    check_sent(opened, looks, store)
    feature_1K, engine = as_tensor(feature_of_picture(store, picture)), opened.trained.engine
    zero_1, one_1 = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    visual = {
        field.name: FieldVectors(engine.services[field.store_name].model(feature_1K), zero_1, one_1)
        for field in engine.fields
        if field.name in looks
    }
    prepared = engine.prepare(group.batch([group.of_ad(ad)]), "eval")
    return Score(float(engine.compute(prepared, engine.model, visual)[0]))


def check_sent(opened: OpenedRun, looks: tuple[str, ...], store: FeatureStore) -> None:
    """Raise ExplorerError if a run cannot score an uploaded picture."""
    from trainer.runs.open import other_features

    if not looks:
        raise ExplorerError(Problem.SEES_NO_PICTURES, opened.name)
    names = {field.store_name for field in opened.trained.engine.fields if field.name in looks}
    for name in names:
        if other_features(store.info, opened.trained.saved.state, name):
            raise ExplorerError(Problem.OTHER_FEATURES, opened.name, store.url)


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
        raise NotHereError(Problem.NO_IMAGE_OF_NAME)
    return with_other_pictures(group, ad, [picture])[0]


def sentence(explanation: Explanation, names: dict[int, str]) -> str:
    """Explain in plain words why the ad got its score. `names`: uris of pictures by key."""
    chosen, group = explanation.chosen, explanation.group
    said = [
        f"Ad {chosen.ad} gets {percent(chosen.score.probability)}, rank {chosen.rank} of {len(explanation.candidates)}."
    ]
    if not group.columns.opened.sees_images:
        said.append("This run uses only IDs, so pictures have no effect.")
        return " ".join(said)
    if group.columns.opened.knows_missing:
        rank = f"rank {chosen.rank_without}" if chosen.rank_without != chosen.rank else "the same rank"
        moved = "raise" if chosen.effect > 0 else "lower"
        said.append(
            f"Without any picture the same run would give it {percent(chosen.without_images.probability)}, {rank}: "
            + (f"pictures {moved} it by {points(abs(chosen.effect))}." if chosen.effect else "pictures change nothing.")
        )
    else:
        said.append("What it would get without pictures is not known: this run was trained with all of them.")
    if not explanation.behaviors:
        said.append("The user has no history, so only the ad's picture counts.")
        return " ".join(said)
    for behavior, word in ((explanation.helped_most, "helps most"), (explanation.hurt_most, "hurts most")):
        if behavior is not None and behavior.without_picture is not None:
            without = percent(behavior.without_picture.probability)
            where = "Of the history, " if len(said) == 2 else ""
            said.append(f"{where}{name_of(behavior.picture, names)} {word}: without it, {without}.")
    return " ".join(said)


def on_missing(opened: OpenedRun) -> str:
    """Explain whether a run was trained for missing images, so that its scores without them are meaningful."""
    model, met = opened.trained.config.model, opened.trained.saved.missing_met
    if opened.trained.saved.met_missing_often:
        return (
            f"While it was trained, this run met images without a feature {met:,} times: it has learned to do without."
        )
    if model.image_dropout:
        return (
            f"This run was trained with model.image_dropout={model.image_dropout}, so it has met ads without a picture."
        )
    known = f"met {met:,}, too few to learn from" if met else "met none"
    seen = "is not known to have met any" if met is None else known
    return (
        f"This run was not trained for missing images: it {seen}. A score without images is not a forecast, and says "
        "nothing of what they are worth: compare it with a run of IDs alone for that."
    )


def name_of(picture: PictureName | None, names: dict[int, str]) -> str:
    """Name an ad's or behaviour's picture: by uri, else by key."""
    return "no picture" if picture is None else names.get(picture.key, f"image {picture.key}")


def percent(value: float) -> str:
    """Write a probability, e.g. 4.21 %; more digits for small ones."""
    return f"{100 * value:.2f} %" if value >= 0.001 else f"{100 * value:.2g} %"


def points(value: float) -> str:
    """Write a difference of probabilities, e.g. 1.11 points."""
    return f"{100 * value:.2f} points" if abs(value) >= 0.0001 else f"{100 * value:.2g} points"


def weighing(opened: OpenedRun) -> str:
    """Say how the run's aggregator weighs behaviours."""
    from trainer.models.pooling import AGGREGATORS

    model = opened.trained.config.model
    if model.images in ("none", "ad"):
        return "This run sees no pictures of behaviours, so none has a weight."
    if model.base == "two_tower":
        return AGGREGATORS["sum"].weighing
    return AGGREGATORS[model.pooling].weighing
