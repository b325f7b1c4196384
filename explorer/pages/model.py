"""The page of a published model: its versions, the one in use, and the age of its vectors."""

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from explorer.data.runs.comparing import TITLES
from explorer.html.site import NavItem, PageKind, Question
from featurestore.errors import FeatureStoreError
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from serving.bundle.log import known_versions, list_versions, newest_vectors, read_version

MODEL = "/model"
_MOST_VERSIONS = 50
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
        storage = Storage(self.site.places.model)
        in_use = read_version(storage)
        return self.site.page(
            request,
            "model.html",
            title="Model",
            url_of_model=storage.url,
            in_use=in_use,
            vectors=list(newest_vectors(storage, in_use)),
            versions=list_versions(storage, _MOST_VERSIONS),
            num_versions=len(known_versions(storage)),
            newest_of=_newest_of,
            metrics=_METRICS,
            titles=TITLES,
        )


def _newest_of(url: str) -> int | None:
    """Return the number of a feature store's newest snapshot; None if it cannot be read."""
    try:
        return FeatureStore.open(url).snapshot().version
    except FeatureStoreError:
        return None
