"""The first page: what there is to see, each with the page that shows it."""

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from explorer.html.site import NavItem
from explorer.pages.kind import PageKind


class HomePages(PageKind):
    """The page at /."""

    @property
    def nav(self) -> NavItem | None:
        """It is reached by the site's name."""
        return None

    def routes(self) -> Sequence[Route]:
        """Return the route of the one page."""
        return [Route("/", self.home)]

    def home(self, request: Request) -> Response:
        """Show the places and the questions that their pages answer."""
        return self.site.page(request, "home.html", title="Overview")
