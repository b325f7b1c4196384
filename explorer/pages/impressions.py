"""Impressions: a list to choose from, and for each sample group why its ads got their scores."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from explorer.data.impressions.explained import (
    Candidate,
    Explanation,
    OtherPicture,
    PictureNames,
    check_sent,
    explain,
    on_missing,
    score_chosen,
    score_sent,
    sentence,
    weighing,
    with_other_pictures,
)
from explorer.data.impressions.groups import PictureName, SampleGroup
from explorer.data.impressions.impression_list import CLICKED, ORDERS, Clicked, Order, score_user, scored_of
from explorer.data.impressions.open_runs import At, OpenedRun
from explorer.data.pictures import shrunk
from explorer.data.runs.folders import RunSummary, open_run
from explorer.data.visual import MOST_BYTES, why_not
from explorer.errors import ExplorerError, NotHereError, tried
from explorer.html.query import Paging, read_upload, whole, whole_in
from explorer.html.site import NavItem, PageKind, Part, Question, Site
from explorer.problems import Problem
from featurestore.errors import SnapshotNotFoundError, UserError
from featurestore.keys import key_of_uri
from featurestore.store import FeatureStore
from featurestore.text import one_line

LIST, PER_PAGE, PER_FROZEN_PAGE = "/impressions", 24, 12
_MOST_OTHERS, _MOST_ADS = 12, 60
_MOST_TYPED, _LARGE = 2_000, 320


@dataclass(frozen=True)
class ListQuestion:
    """The query of the list, from an address."""

    run: str
    order: Order = "effect"
    clicked: Clicked = "any"
    query: str = ""

    @property
    def params(self) -> dict[str, str]:
        """The parameters of the address of this query, without its page."""
        asked = {"run": self.run, "order": self.order, "clicked": self.clicked, "q": self.query}
        defaults = {"order": "effect", "clicked": "any", "q": ""}
        return {name: value for name, value in asked.items() if defaults.get(name) != value}


class ImpressionPages(PageKind):
    """The pages below /impressions."""

    needs = "runs"
    nav = NavItem("Impressions", LIST)
    questions = (
        Question(
            "Why did this ad get this score?",
            LIST,
            "A user with the pictures of the history, the ads with and without images, and with another picture.",
        ),
    )

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.runs = site.trained_runs
        self.names = PictureNames(site.places.store)

    def routes(self) -> Sequence[Route]:
        """List the routes: the list, a group, and a group with an uploaded picture."""
        return [
            Route(LIST, self.listing),
            Route(LIST + "/{run}/{number}", self.group),
            *([] if self.site.frozen else [Route(LIST + "/{run}/{number}/sent", self.sent, methods=["POST"])]),
        ]

    def close(self) -> None:
        """Close the runs."""
        self.runs.close()

    def listing(self, request: Request) -> Response:
        """Show the list; the first time, its run is opened for it."""
        runs = self.runs.names()
        if not runs:
            return self.site.page(request, "Impressions", Part(template="impressions/no-run.html"))
        asked = self._question(request, runs)
        words = {run.name: f"{run.name} ({run.text})" for run in runs}
        form = {"asked": asked, "orders": ORDERS, "clicked": CLICKED, "run_words": words}
        return self.site.page(
            request,
            "Impressions",
            Part(template="impressions/asked.html", values=form),
            Part(
                template="impressions/list.html",
                values=lambda: self._listed(request, asked),
                is_quick=self.runs.is_listed(asked.run),
                what="Opening the run and scoring its impressions, which takes some seconds the first time",
            ),
        )

    def group(self, request: Request) -> Response:
        """Show one sample group; the first time, its run is opened for it."""
        run, number = request.path_params["run"], whole_in(request.path_params["number"], "group")
        open_run(self.site.places, run)
        at = _snapshot(request)

        def why() -> dict[str, Any]:
            try:
                return {"expired": "", **self._explained(request, run, number, at)}
            except UserError as error:
                if at == "newest" or not isinstance(error.__cause__, SnapshotNotFoundError):
                    raise
                return {"expired": one_line(error)}

        part = Part(
            template="impressions/why.html",
            values=why,
            is_quick=self.runs.is_open(run, at),
            is_page=True,
            what="Opening the run, which takes some seconds the first time",
        )
        up = Part(template="impressions/up.html")
        return self.site.page(request, f"Impressions of group {number:,}", up, part, run=run, number=number)

    async def sent(self, request: Request) -> Response:
        """Show the score of an ad with an uploaded picture, which is not stored."""
        data, fields = await read_upload(request, "picture", MOST_BYTES)
        return await run_in_threadpool(self._sent, request, data, whole_in(fields.get("ad") or "0", "ad"))

    def _sent(self, request: Request, data: bytes, ad: int) -> Response:
        run, number = request.path_params["run"], whole_in(request.path_params["number"], "group")
        at: At = _snapshot(request)
        if self.site.places.store is None:
            raise ExplorerError(Problem.NEEDS_STORE)
        with self.runs.use(run, at) as opened:
            explanation = explain(opened, number, ad, most_behaviors=0)
            store = FeatureStore.open(self.site.places.store)
            score = score_sent(explanation.group, ad, store, data)
            chosen = explanation.chosen.picture
            names = self._names(opened, [] if chosen is None else [chosen])
            no_forecast = "" if opened.knows_missing else on_missing(opened)
        shown = {
            "run": run,
            "number": number,
            "at": at,
            "picture_jpeg": base64.b64encode(shrunk(data, _LARGE).jpeg).decode(),
            "chosen": explanation.chosen,
            "score": score,
            "no_forecast": no_forecast,
            "names": names,
        }
        title = f"Ad {explanation.chosen.ad} with your picture"
        return self.site.page(request, title, Part(template="impressions/sent.html", values=shown))

    def _question(self, request: Request, runs: Sequence[RunSummary]) -> ListQuestion:
        params = request.query_params
        order, clicked = params.get("order", "effect"), params.get("clicked", "any")
        if order not in ORDERS or clicked not in CLICKED:
            raise ExplorerError(Problem.NO_ORDER)
        run = params.get("run") or runs[0].name
        if run not in {each.name for each in runs}:
            raise NotHereError(Problem.NO_TRAINED_RUN, run[:60])
        return ListQuestion(run, order, clicked, params.get("q", "").strip()[:_MOST_TYPED])

    def _listed(self, request: Request, asked: ListQuestion) -> dict[str, Any]:
        with self.runs.use(asked.run) as opened:
            scored = scored_of(opened)
            found = scored.chosen(asked.order, asked.clicked, asked.query)
            elsewhere = False
            if not len(found) and asked.query and scored.num < scored.total:
                of_user = score_user(opened, asked.query)
                if of_user.num:
                    scored, elsewhere = of_user, True
                    found = scored.chosen(asked.order, asked.clicked, "")
            per_page = PER_FROZEN_PAGE if self.site.frozen else PER_PAGE
            paging = Paging.of(request, len(found), per_page)
            rows = scored.rows(found[paging.first : paging.first + per_page])
            pictures = [PictureName(row.picture, None) for row in rows if row.picture is not None]
            return {
                "asked": asked,
                "rows": rows,
                "ads": opened.texts(row.ad for row in rows),
                "names": self._names(opened, pictures),
                "scored": scored,
                "elsewhere": elsewhere,
                "paging": paging,
                "sees_images": opened.sees_images,
                "knows_missing": opened.knows_missing,
                "on_missing": on_missing(opened),
            }

    def _explained(self, request: Request, run: str, number: int, at: At) -> dict[str, Any]:
        ad = whole(request, "ad")
        typed = request.query_params.get("picture", "").strip()[:_MOST_TYPED]
        with self.runs.use(run, at) as opened:
            ids = self._ids_run(opened)
            if ids is None:
                explanation = explain(opened, number, ad)
            else:
                with self.runs.use(ids) as ids_run:
                    explanation = explain(opened, number, ad, ids_run)
            others = self._others(explanation)
            own, problem_of_own = self._own(explanation, typed, opened)
            pictures = [
                *(each.picture for each in _shown(explanation) if each.picture is not None),
                *(each.picture for each in explanation.behaviors),
                *(each.picture for each in others),
                *((own.picture,) if own else ()),
            ]
            names = self._names(opened, pictures)
            return {
                "why": explanation,
                "shown_ads": _shown(explanation),
                "names": names,
                "sentence": sentence(explanation, names),
                "on_missing": on_missing(opened),
                "weighing": weighing(opened),
                "ids_run": ids,
                "opened": opened,
                "stores": opened.trained.stores,
                "own": own,
                "problem_of_own": problem_of_own,
                "typed": typed,
                "others": others,
                "takes_pictures": self._takes_pictures(opened, explanation.group),
            }

    def _others(self, explanation: Explanation) -> list[OtherPicture]:
        """Score the ad with the pictures of the other ads of its group, best first."""
        group, chosen = explanation.group, explanation.chosen
        if chosen.picture is None:
            return []
        pictures = {each.picture.key: each.picture for each in _shown(explanation) if each.picture is not None}
        pictures.pop(chosen.picture.key, None)
        others = with_other_pictures(group, chosen.place, list(pictures.values())[:_MOST_OTHERS])
        return sorted(others, key=lambda each: -each.score.logit)

    def _own(self, explanation: Explanation, typed: str, opened: OpenedRun) -> tuple[OtherPicture | None, str]:
        """Score the ad with the picture that the user chose, or return the reason why not."""
        if not typed or explanation.chosen.picture is None:
            return None, ""
        picture = self._typed(explanation.group, typed, opened)
        group, ad = explanation.group, explanation.chosen.place
        return tried(lambda: score_chosen(group, ad, picture, self.site.places.store))

    def _typed(self, group: SampleGroup, typed: str, opened: OpenedRun) -> PictureName:
        """Read the user's input: a key or a uri."""
        try:
            key = int(typed)
        except ValueError:
            return PictureName(key_of_uri(typed), typed)
        if not -(2**63) <= key < 2**63:
            raise ExplorerError(Problem.NOT_KEY, typed[:40])
        return PictureName(key, self._names(opened, [PictureName(key, None)]).get(key))

    def _ids_run(self, opened: OpenedRun) -> str | None:
        """Find a run of IDs only to compare with one with images, preferably of the same net."""
        if not opened.sees_images:
            return None
        others = [each for each in self.runs.names() if each.images == "none"]
        same = [each for each in others if each.base == opened.trained.config.model.base]
        return next((each.name for each in (*same, *others)), None)

    def _takes_pictures(self, opened: OpenedRun, group: SampleGroup) -> str:
        """Return the reason why no picture can be uploaded, or an empty text."""
        if self.site.places.store is None or self.site.frozen:
            return "No --store is given."
        try:
            store = FeatureStore.open(self.site.places.store)
            check_sent(opened, group.columns.looks_of_ads, store)
        except UserError as error:
            return Problem.NO_UPLOAD.of(one_line(error))
        return str(why_not(store.info) or "")

    def _names(self, opened: OpenedRun, pictures: Sequence[PictureName]) -> dict[int, str]:
        field = next(opened.schema.of_kind("content"), None)
        return self.names.of(opened, field.store_name, pictures) if field else {}


def _shown(explanation: Explanation) -> list[Candidate]:
    """Choose the ads of a page: the best ones, and the explained one."""
    best = sorted(explanation.candidates, key=lambda each: each.rank)
    shown = best[:_MOST_ADS]
    return shown if explanation.chosen in shown else [*shown, explanation.chosen]


def _snapshot(request: Request) -> At:
    return "newest" if request.query_params.get("snapshot") == "newest" else "trained"
