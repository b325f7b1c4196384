"""The page of a published model: its versions, the one in use, and the age of its vectors."""

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from explorer.data.published import read_model
from explorer.data.runs.comparing import TITLES
from explorer.html.site import NavItem, PageKind, Question

MODEL = "/model"
_METRICS = ("auc", "gauc", "logloss", "new_ad_auc")


class ModelPages(PageKind):
    """The page at /model."""

    @property
    def nav(self) -> NavItem | None:
        """The entry Model, if a model is given."""
        return NavItem("Model", MODEL) if self.site.places.model is not None else None

    def routes(self) -> Sequence[Route]:
        """Return the route of the one page."""
        return [Route(MODEL, self.model)] if self.nav is not None else []

    @property
    def questions(self) -> Sequence[Question]:
        """List the most frequent question."""
        return [
            Question(
                "Which model is in use, and how old are its vectors?",
                MODEL,
                "The versions of the published model, the run of each, and the snapshots of its vectors.",
            ),
        ]

    def model(self, request: Request) -> Response:
        """Show the versions and the vectors of the one in use."""
        assert self.site.places.model is not None
        return self.site.page(
            request,
            "model.html",
            title="Model",
            model=read_model(self.site.places.model),
            metrics=_METRICS,
            titles=TITLES,
        )
