"""The scorer: a published model's versions, the server that answers with it, and impressions scored over HTTP."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from explorer.data.impressions.another_picture import PictureNames
from explorer.data.impressions.explained import name_of, percent
from explorer.data.impressions.groups import PictureName
from explorer.data.runs.comparing import TITLES
from explorer.data.scorer.child import ChildScorer, ChildState
from explorer.data.scorer.compared import TOLERANCE, compare, run_of
from explorer.data.scorer.figures import read_figures
from explorer.data.scorer.published import PublishedModel, read_model
from explorer.html.query import number_of
from explorer.html.site import NavItem, PageKind, Question, Site
from featurestore.errors import UserError
from featurestore.text import one_line
from serving.scoring.remote import RemoteScorer, trusted

SCORER = "/scorer"
_METRICS = ("auc", "gauc", "logloss", "new_ad_auc")


class ScorerPages(PageKind):
    """The pages below /scorer."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.child: ChildScorer | None = None
        if site.places.model is not None and site.places.scorer is None and not site.frozen:
            self.child = ChildScorer(site.places.model)
        self.names = PictureNames(site.places.store)

    @property
    def nav(self) -> NavItem | None:
        """The scorer is that of a model."""
        return NavItem("Scorer", SCORER) if self.site.places.model is not None else None

    def routes(self) -> Sequence[Route]:
        """Return the routes of the scorer and of an impression, each with the part of it that asks the server."""
        if self.nav is None:
            return []
        return [
            Route(SCORER, self.overview),
            Route(SCORER + "/part", self.overview_part),
            Route(SCORER + "/impression/{number}", self.impression),
            Route(SCORER + "/impression/{number}/part", self.impression_part),
        ]

    @property
    def questions(self) -> Sequence[Question]:
        """List what is asked most."""
        return [
            Question(
                "Which model answers, and is it the one that was trained?",
                SCORER,
                "Versions, the age of its vectors, latencies, and scores over HTTP next to those of the run.",
            ),
        ]

    def close(self) -> None:
        """End the explorer's own scorer."""
        if self.child is not None:
            self.child.close()

    def overview(self, request: Request) -> Response:
        """Show what is published, and around the live part what fetches it."""
        model = self._model()
        context: dict[str, Any] = {
            "model": model,
            "metrics": _METRICS,
            "titles": TITLES,
            "scorer": self.site.places.scorer,
            "now": "now" in request.query_params,
        }
        if context["now"] and not self.site.frozen:
            context |= self._live()
        return self.site.page(request, "scorer/overview.html", title="Scorer", **context)

    def overview_part(self, request: Request) -> Response:
        """Give the figures of the server, or how far it is."""
        return self._part(request, "scorer/live.html", self._live)

    def impression(self, request: Request) -> Response:
        """Show a group scored over HTTP, or what fetches that."""
        number, ad = _numbers(request)
        now = "now" in request.query_params
        context: dict[str, Any] = {"number": number, "ad": ad, "now": now}
        if now:
            context |= self._compared(number, ad)
        return self.site.page(
            request, "scorer/impression.html", title=f"Impressions of group {number:,} over HTTP", **context
        )

    def impression_part(self, request: Request) -> Response:
        """Give a group scored over HTTP, or how far the server is."""
        number, ad = _numbers(request)
        return self._part(
            request, "scorer/impression-part.html", lambda: {"number": number, "ad": ad, **self._compared(number, ad)}
        )

    def _part(self, request: Request, template: str, context: Callable[[], dict[str, Any]]) -> Response:
        """Give a part of a page; what goes wrong is said in it, as htmx shows no answer of another status than 200."""
        try:
            return self.site.page(request, template, title="", **context())
        except UserError as error:
            problem = one_line(error)
            return self.site.page(request, "scorer/problem.html", title="", problem=problem)

    def _model(self) -> PublishedModel:
        assert self.site.places.model is not None
        return read_model(self.site.places.model)

    @cached_property
    def _running(self) -> RemoteScorer:
        """What asks the scorer that was named to the explorer."""
        from featurestore.console.files import read_tokens

        places = self.site.places
        assert places.scorer is not None
        token = read_tokens(places.scorer_token_file)[0] if places.scorer_token_file else None
        return RemoteScorer(places.scorer, token, trusted(places.scorer_ca) if places.scorer_ca else None)

    def _ready(self) -> tuple[ChildState | None, RemoteScorer | None]:
        """Give what asks the server, where it is ready, and how far it is where it is a child."""
        if self.child is None:
            return None, self._running
        return self.child.state(), self.child.scorer()

    def _live(self) -> dict[str, Any]:
        state, scorer = self._ready()
        figures = None if scorer is None else read_figures(scorer)
        return {"state": state, "figures": figures}

    def _compared(self, number: int, ad: int) -> dict[str, Any]:
        state, scorer = self._ready()
        if scorer is None:
            return {"state": state, "compared": None}
        model = self._model()
        run = run_of(self.site.places, model)
        found = compare(self.site.trained_runs, run, model, scorer, number, ad)
        return {
            "state": state,
            "compared": found,
            "model": model,
            "run": run,
            "tolerance": TOLERANCE,
            "names": self._names(run, found.group, [*found.ads, *found.behaviors, *found.others]),
            "name_of": name_of,
            "percent": percent,
        }

    def _names(self, run: str, group: Any, shown: Sequence[Any]) -> dict[int, str]:
        pictures: list[PictureName] = [picture for each in shown for picture in each.pictures[:1]]
        field = next(group.columns.opened.schema.of_kind("content"), None)
        return self.names.of(group.columns.opened, field.store_name, pictures) if field else {}


def _numbers(request: Request) -> tuple[int, int]:
    """Read group and ad out of an address. Raises NotHereError."""
    return number_of(request.path_params["number"], "group"), number_of(request.query_params.get("ad") or "0", "ad")
