"""What every kind of page is: some routes, and an entry of the navigation where its places are given."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from starlette.routing import Route

from explorer.html.site import NavItem, Question, Site


class PageKind(ABC):
    """Pages of one kind. Endpoints are plain functions `(request) -> response`: starlette runs them in threads."""

    def __init__(self, site: Site) -> None:
        self.site = site

    @property
    @abstractmethod
    def nav(self) -> NavItem | None:
        """The entry of the navigation; None where the places that these pages show are not given."""

    @property
    def questions(self) -> Sequence[Question]:
        """List what these pages answer, for the first page; asked only of kinds whose places are given."""
        return ()

    @abstractmethod
    def routes(self) -> Sequence[Route]:
        """List the routes; a kind without its places has none."""

    def close(self) -> None:  # noqa: B027
        """Release what the pages hold open; most hold nothing."""
