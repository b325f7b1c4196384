"""Pictures by uri, for the pages that show them."""

import hashlib
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from explorer.html.links import PICTURE
from explorer.html.site import THUMBNAIL, NavItem
from explorer.pages.kind import PageKind

_HOLDS_S = 60


class PicturePages(PageKind):
    """Small pictures at /picture?uri=...&size=..."""

    @property
    def nav(self) -> NavItem | None:
        """Pictures are parts of other pages."""
        return None

    def routes(self) -> Sequence[Route]:
        """Return the one route, also without a place of images: pages then show grey squares."""
        return [Route(PICTURE, self.picture)]

    def picture(self, request: Request) -> Response:
        """Give a picture as JPEG; one that is missing or broken is a grey one, with the reason in a header."""
        size = request.query_params.get("size", "")
        number = int(size[:5]) if size.isascii() and size.isdigit() else THUMBNAIL
        found = self.site.pictures.get(request.query_params.get("uri", ""), number)
        tag = f'"{hashlib.sha256(found.jpeg).hexdigest()[:32]}"'
        headers = {"ETag": tag, "Cache-Control": f"private, max-age={_HOLDS_S}"}
        if found.problem:
            headers["X-Picture-Problem"] = found.problem.encode("ascii", "replace").decode()
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(found.jpeg, media_type="image/jpeg", headers=headers)
