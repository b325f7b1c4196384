"""What pages say about an impression, in plain words."""

from collections.abc import Sequence

from explorer.data.impressions.explained import Explanation
from explorer.data.impressions.groups import PictureName
from explorer.data.impressions.opened import OpenedRun


def sentence(explanation: Explanation, names: dict[int, str]) -> str:
    """Say in plain words why the ad got its score. `names`: uris of pictures by key."""
    chosen, group = explanation.chosen, explanation.group
    said = [
        f"Ad {chosen.ad} gets {percent(chosen.score.probability)}, rank {chosen.rank} of {len(explanation.candidates)}."
    ]
    if not group.columns.opened.sees_images:
        said.append("This run sees IDs alone, so no picture has a part in it.")
        return " ".join(said)
    if group.columns.opened.knows_missing:
        rank = f"rank {chosen.rank_without}" if chosen.rank_without != chosen.rank else "the same rank"
        moved = "raise" if chosen.effect > 0 else "lower"
        said.append(
            f"Without any picture the same run would give it {percent(chosen.without_images.probability)}, {rank}: "
            + (f"pictures {moved} it by {points(abs(chosen.effect))}." if chosen.effect else "pictures change nothing.")
        )
    else:
        said.append("What it would give without any picture is not known: it was trained with all of them.")
    if not explanation.behaviors:
        said.append("The user has no history, so it is the ad's picture alone.")
        return " ".join(said)
    for behavior, word in ((explanation.helped_most, "helps most"), (explanation.hurt_most, "hurts most")):
        if behavior is not None and behavior.without_picture is not None:
            without = percent(behavior.without_picture.probability)
            where = "Of the history, " if len(said) == 2 else ""
            said.append(f"{where}{name_of(behavior.pictures, names)} {word}: without it, {without}.")
    return " ".join(said)


def on_missing(opened: OpenedRun) -> str:
    """Say whether a run was trained for missing images, so that its scores without them mean something."""
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
        f"This run was not trained for missing images: it {seen}. What it gives without images says nothing of what "
        "they are worth: compare it with a run of IDs alone for that."
    )


def name_of(pictures: Sequence[PictureName], names: dict[int, str]) -> str:
    """Name an ad's or behaviour's picture: by uri, else by key."""
    if not pictures:
        return "no picture"
    first = names.get(pictures[0].key, f"image {pictures[0].key}")
    return first if len(pictures) == 1 else f"{first} and {len(pictures) - 1} more"


def percent(value: float) -> str:
    """Write a probability, e.g. 4.21 %; more digits for small ones."""
    return f"{100 * value:.2f} %" if value >= 0.001 else f"{100 * value:.2g} %"


def points(value: float) -> str:
    """Write a difference of probabilities, e.g. 1.11 points."""
    return f"{100 * value:.2f} points" if abs(value) >= 0.0001 else f"{100 * value:.2g} points"


_WEIGHING = {
    "attentive": "The aggregator is attentive: the weights of a history sum to 100 %.",
    "multi_query": "The aggregator asks twice, with the ad's picture and with its IDs: each makes weights of its own, "
    "which sum to 100 %.",
    "transformer": "The aggregator is a transformer: the weights are how much the behaviours look at each one, on "
    "average; they sum to 100 %, and nothing is multiplied by them alone.",
    "sum": "The aggregator is a plain sum, so no behaviour has a weight: its effect on the score is shown.",
    "mean": "The aggregator is a plain mean, so all behaviours weigh the same: their effects on the score are shown.",
    "max": "The aggregator takes maxima, so no behaviour has a weight: its effect on the score is shown.",
    "concat": "The aggregator puts the newest behaviours side by side, so none has a weight: its effect on the score "
    "is shown.",
}


def weighing(opened: OpenedRun) -> str:
    """Say how the run's aggregator weighs behaviours."""
    model = opened.trained.config.model
    if model.images in ("none", "ad"):
        return "This run sees no pictures of behaviours, so none has a weight."
    if model.base == "two_tower":
        return _WEIGHING["sum"]
    text = _WEIGHING[model.pooling]
    if model.similarity_top_k:
        text += f" Only the {model.similarity_top_k} behaviours whose pictures are most like the ad's are looked at."
    return text
