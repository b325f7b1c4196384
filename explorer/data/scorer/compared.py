"""A sample group scored over HTTP, next to the scores of the run that the model was made of.

Images are looked up in the snapshot that the model's vectors were made of, so that the two have to agree. Letters of
shapes: C ads of the group, L behaviours.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from explorer.data.impressions.explained import MOST_BEHAVIORS, Score, other_pictures
from explorer.data.impressions.groups import GroupColumns, PictureName, Row, SampleGroup
from explorer.data.impressions.open_runs import At, OpenedRun, TrainedRuns
from explorer.data.scorer.published import PublishedModel
from explorer.errors import ExplorerError
from explorer.places import Places
from featurestore.published.paths import run_path
from serving.scoring.remote import RemoteScorer

TOLERANCE = 1e-5
"""Of a logit, as `python -m serving check` has it."""
_OTHERS = 12


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A score over HTTP, and the run's own."""

    by_http: Score
    by_run: Score

    @property
    def difference(self) -> float:
        """The difference of the two logits."""
        return self.by_http.logit - self.by_run.logit

    @property
    def agrees(self) -> bool:
        """Whether they differ by rounding alone."""
        return abs(self.difference) <= TOLERANCE


@dataclass(frozen=True, kw_only=True)
class ComparedAd:
    """An ad of the group."""

    place: int
    ad: str
    pictures: tuple[PictureName, ...]
    clicked: bool
    scores: Compared
    rank: int
    """Among the ads of the group over HTTP, from 1."""


@dataclass(frozen=True, kw_only=True)
class ComparedBehavior:
    """A behaviour: what the first ad gets from a user without it."""

    place: int
    pictures: tuple[PictureName, ...]
    without_it: Compared


@dataclass(frozen=True, kw_only=True)
class ComparedPicture:
    """What the first ad gets with another picture."""

    pictures: tuple[PictureName, ...]
    """The one."""
    with_it: Compared


@dataclass(frozen=True, kw_only=True)
class ComparedGroup:
    """A group scored over HTTP and by the run."""

    group: SampleGroup
    ads: list[ComparedAd]
    """Highest score first."""
    behaviors: list[ComparedBehavior]
    others: list[ComparedPicture]
    chosen: ComparedAd
    version: int
    unknown: Mapping[str, int]
    """Values by field whose row no training sample had."""
    missing: Mapping[str, int]
    """Images by field without a vector."""
    seconds: float
    """From the table to the parsed answer, of the group alone."""
    snapshot: int | None
    """In which the run looked images up."""

    @property
    def worst(self) -> float:
        """The largest difference of a logit."""
        all_scores = [
            *(each.scores for each in self.ads),
            *(each.without_it for each in self.behaviors),
            *(each.with_it for each in self.others),
        ]
        return max((abs(each.difference) for each in all_scores), default=0.0)


def run_of(places: Places, model: PublishedModel) -> str:
    """Find the run that the version in use was made of, by its name and its checkpoint. Raises ExplorerError."""
    from trainer.runs.saved import read_run

    manifest = model.in_use
    name = run_path(manifest.run).name
    if places.runs is None or not (run_path(places.runs) / name / "config.yaml").is_file():
        raise ExplorerError(
            f"version {manifest.version} was made of the run {manifest.run}, and --runs has none of that name: its "
            "scores cannot be compared"
        )
    digest = read_run(run_path(places.runs) / name).digest
    if digest != manifest.checkpoint_digest:
        raise ExplorerError(
            f"version {manifest.version} was made of {manifest.checkpoint} of the run {name}, which has a newer "
            "checkpoint now: export the run again to compare them"
        )
    return name


def compare(
    runs: TrainedRuns, run: str, model: PublishedModel, scorer: RemoteScorer, number: int, ad: int
) -> ComparedGroup:
    """Score group `number` over HTTP and by its run.

    Scored are its ads; and ad `ad` for users without each behaviour, and with other pictures.

    Raises NotHereError, ServingError where the server does not answer, TrainerError, FeatureStoreError.
    """
    at: At = model.vectors[0].source_version if model.vectors else "trained"
    with runs.use(run, at) as opened:
        group = GroupColumns(opened).read(number)
        columns = _columns(model, opened)
        rows = [group.row]
        start_s = time.perf_counter()
        answer = scorer.ask(_table(group, rows, columns))
        seconds = time.perf_counter() - start_s
        by_http: list[float] = _lists(answer, "logit")[0]
        by_run = opened.logits(group.batch(rows)).tolist()
        chosen = min(max(ad, 0), len(by_run) - 1)
        behaviors = _behaviors(opened, group, chosen, scorer, columns)
        others = _others(opened, group, chosen, scorer, columns)
        snapshot = opened.trained.store_version
    pictures = group.ad_pictures or [()] * len(by_run)
    ads = [
        ComparedAd(
            place=place,
            ad=name,
            pictures=pictures[place],
            clicked=label == 1,
            scores=Compared(by_http=Score(one), by_run=Score(other)),
            rank=1 + sum(each > one for each in by_http),
        )
        for place, (name, label, one, other) in enumerate(zip(group.ads, group.labels, by_http, by_run, strict=True))
    ]
    return ComparedGroup(
        group=group,
        ads=sorted(ads, key=lambda each: each.rank),
        behaviors=behaviors,
        others=others,
        chosen=ads[chosen],
        version=scorer.version or 0,
        unknown=_counts(answer, "unknown"),
        missing=_counts(answer, "missing"),
        seconds=seconds,
        snapshot=snapshot,
    )


def _behaviors(
    opened: OpenedRun, group: SampleGroup, ad: int, scorer: RemoteScorer, columns: list[str]
) -> list[ComparedBehavior]:
    pictures = group.behavior_pictures[:MOST_BEHAVIORS]
    if not pictures:
        return []
    alone = group.of_ad(ad)
    rows = [group.without_behavior(alone, place) for place in range(len(pictures))]
    by_http = _lists(scorer.ask(_table(group, rows, columns)), "logit")
    by_run = opened.logits(group.batch(rows)).tolist()
    return [
        ComparedBehavior(
            place=place,
            pictures=pictures[place],
            without_it=Compared(by_http=Score(one[0]), by_run=Score(other)),
        )
        for place, (one, other) in enumerate(zip(by_http, by_run, strict=True))
    ]


def _others(
    opened: OpenedRun, group: SampleGroup, ad: int, scorer: RemoteScorer, columns: list[str]
) -> list[ComparedPicture]:
    pictures = other_pictures(group, _OTHERS)
    if not pictures:
        return []
    rows = [group.with_pictures(group.of_ad(ad), pictures)]
    by_http = _lists(scorer.ask(_table(group, rows, columns)), "logit")[0]
    by_run = opened.logits(group.batch(rows)).tolist()
    return [
        ComparedPicture(pictures=(picture,), with_it=Compared(by_http=Score(one), by_run=Score(other)))
        for picture, one, other in zip(pictures, by_http, by_run, strict=True)
    ]


def _columns(model: PublishedModel, opened: OpenedRun) -> list[str]:
    """List the columns of a request: those that the run's model uses."""
    from serving.scoring.columns import RequestColumns

    return list(RequestColumns(opened.schema, opened.trained.engine.fields).sources)


def _table(group: SampleGroup, rows: list[Row], columns: list[str]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=group.table.schema).select(columns)


def _lists(answer: pa.Table, column: str) -> list[Any]:
    values: list[Any] = answer[column].to_pylist()
    return values


def _counts(answer: pa.Table, column: str) -> dict[str, int]:
    return {field: len(places) for field, places in _lists(answer, column)[0] if places}
