"""The map: images in a plane, by the visual vectors of a run."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from explorer.data import map as laid_out
from explorer.data.background import Task
from explorer.data.map import COLOURS, FILES, MapPoints, make_map, matching
from explorer.data.runs.folders import open_run, read_facts
from explorer.data.visual import image_runs
from explorer.errors import NotHereError, tried
from explorer.html import charts
from explorer.html.query import choice
from explorer.html.site import NavItem, PageKind, Question
from explorer.problems import Problem
from featurestore.store import FeatureStore

_MOST_TYPED = 200


class MapPages(PageKind):
    """The page at /map, and its points as a file."""

    needs = "runs"
    nav = NavItem("Map", "/map")
    questions = (
        Question(
            "What has a run learned of all images?",
            "/map",
            "Images in a plane, near where they are alike, by folder or click-through rate.",
        ),
    )

    def routes(self) -> Sequence[Route]:
        """Return the routes of the page and of its file."""
        return [
            Route("/map", self.map),
            Route("/map/points/{digest}.parquet", self.points),
        ]

    def map(self, request: Request) -> Response:
        """Show the requested map; one that is not computed yet is loaded later."""
        runs = image_runs(self.site.places)
        if "run" not in request.query_params and not runs:
            return self.site.page(request, "map/none.html", title="Map")
        run = request.query_params.get("run") or runs[0]
        network = request.query_params.get("network") or None
        colour: Any = choice(request, "colour", tuple(COLOURS))
        query = request.query_params.get("q", "").strip()[:_MOST_TYPED]
        task, store_id = self._begin(run, network)
        is_ended = self.await_task(request, "map", task)
        points, problem = tried(task.result) if is_ended else (None, "")
        has_pages = points is not None and points.about["store_id"] == store_id
        return self.site.page(
            request,
            "map/map.html",
            title="Map",
            task=task,
            is_ended=is_ended,
            points=points,
            problem=problem,
            has_pages=has_pages,
            found=matching(points, query) if points and query else np.empty(0, np.int64),
            query=query,
            runs=runs,
            run=run,
            network=network,
            colour=colour,
            colours=COLOURS,
            maps=charts,
            laid_out=laid_out,
            links=self._links(has_pages=has_pages),
        )

    def points(self, request: Request) -> Response:
        """Return the points of a map that a page has shown, as Parquet."""
        digest = request.path_params["digest"]
        file = FILES.path(digest) if re.fullmatch("[0-9a-f]{24}", digest) else None
        if file is None or not file.is_file():
            raise NotHereError(Problem.NOT_CACHED)
        return FileResponse(file, media_type="application/vnd.apache.parquet")

    def _links(self, *, has_pages: bool) -> charts.PointLinks:
        """Write the addresses of points; none in an export, which would get a page and a picture for every point."""
        has_pictures = self.site.places.images is not None
        return charts.PointLinks(
            lambda key: self.site.url(f"/images/{key}") if has_pages and not self.site.frozen else None,
            lambda uri: self.site.picture(uri) if has_pictures and not self.site.frozen else None,
        )

    def _begin(self, run: str, network: str | None) -> tuple[Task[MapPoints], str | None]:
        """Start the map, or return the task of before, and the id of the store whose images have pages."""
        places = self.site.places
        identity, store_id = read_facts(open_run(places, run)).checkpoint, None
        if places.store is not None:
            snapshot = FeatureStore.open(places.store).snapshot()
            identity, store_id = f"{identity} {snapshot.version}", snapshot.info.store_id
        name = repr(("map", run, network, identity))
        return self.site.background.task(name, lambda task: make_map(places, run, task, network)), store_id
