"""The map: images in a plane, by the visual vectors of a run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import numpy as np
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from explorer.data.background import Task
from explorer.data.map import COLOURS, Cell, Colour, MapPoints, cells, drawn, has, make_map, matching
from explorer.data.runs.folders import open_run, read_facts
from explorer.errors import ExplorerError, NotHereError
from explorer.html import charts
from explorer.html.site import NavItem, PageKind, Question
from featurestore.errors import UserError
from featurestore.keys import Int64Array
from featurestore.text import one_line

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
            Route("/map/points.parquet", self.points),
        ]

    def map(self, request: Request) -> Response:
        """Show the requested map; one that is not computed yet is loaded later."""
        runs = self.site.image_runs.names()
        if "run" not in request.query_params and not runs:
            return self.site.page(request, "map/none.html", title="Map")
        run, network, colour = self._asked(request, runs)
        part = self._part(run, network, colour)
        part.query = request.query_params.get("q", "").strip()[:_MOST_TYPED]
        self.await_task(request, "map", part.task)
        return self.site.page(
            request,
            "map/map.html",
            title="Map",
            part=part,
            runs=runs,
            run=run,
            network=network,
            colour=colour,
            colours=COLOURS,
            maps=charts,
            links=self._links,
        )

    def points(self, request: Request) -> Response:
        """Return the points as Parquet."""
        run, network, colour = self._asked(request, ())
        shown = self._part(run, network, colour).shown
        if shown is None:
            raise NotHereError("the map is not computed yet; open its page first")
        of = "-".join(filter(None, (run, network)))
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"map-{of}.parquet")
        return FileResponse(shown.file, filename=name, media_type="application/vnd.apache.parquet")

    def _links(self, part: "MapPart") -> charts.PointLinks:
        """Write the addresses of points; none in an export, which would get a page and a picture for every point."""
        has_pages, has_pictures = part.has_pages and not self.site.frozen, self.site.places.images is not None
        return charts.PointLinks(
            lambda key: self.site.url(f"/images/{key}") if has_pages else None,
            lambda uri: self.site.picture(uri) if has_pictures and not self.site.frozen else None,
        )

    def _asked(self, request: Request, runs: Sequence[str]) -> tuple[str, str | None, Colour]:
        """Read the requested run, by default the first of `runs`, its E, and the colour."""
        of = request.query_params.get("run") or next(iter(runs), "")
        colour = request.query_params.get("colour", "folder")
        if colour not in get_args(Colour):
            raise ExplorerError(f"colour={colour[:40]!r} is not one of {', '.join(COLOURS)}")
        named: Colour = colour  # type: ignore[assignment]
        open_run(self.site.places, of)
        return of, request.query_params.get("network") or None, named

    def _part(self, run: str, network: str | None, colour: Colour) -> "MapPart":
        """Start the map, or return its state."""
        places = self.site.places
        identity, store_id = read_facts(open_run(places, run)).checkpoint, None
        if places.store is not None:
            from featurestore.store import FeatureStore

            snapshot = FeatureStore.open(places.store).snapshot()
            identity, store_id = f"{identity} {snapshot.version}", snapshot.info.store_id
        task: Task[MapPoints] = self.site.background.task(
            repr(("map", run, network, identity)),
            lambda task: make_map(places, run, task, network),
        )
        return MapPart(run=run, network=network, colour=colour, task=task, store_id=store_id)


@dataclass(kw_only=True)
class MapPart:
    """The state of a map at the first access, so that one answer shows one state."""

    run: str
    network: str | None
    """The requested E of the run; None: the first."""
    colour: Colour
    task: Task[MapPoints]
    store_id: str | None
    """Id of the store whose images have pages; None if none was given."""
    query: str = ""
    """Text that is searched in the names of the images."""

    @cached_property
    def is_ended(self) -> bool:
        """Return whether there is a map, or a reason why there is none."""
        return self.task.is_ended

    @property
    def problem(self) -> str:
        """The reason why there is no map."""
        error = self.task.error if self.is_ended else None
        if error is None or isinstance(error, UserError):
            return "" if error is None else one_line(error)
        raise error

    @cached_property
    def shown(self) -> MapPoints | None:
        """The map; None until it is there."""
        return self.task.result() if self.is_ended and self.task.error is None else None

    @property
    def networks(self) -> list[str]:
        """The networks E to choose from; empty unless there are several."""
        found: list[str] = [] if self.shown is None else self.shown.about["networks"]
        return found if len(found) > 1 else []

    @property
    def has_pages(self) -> bool:
        """Return whether the images belong to the shown store, so that each has a page."""
        return self.shown is not None and self.store_id == self.shown.about["store_id"]

    @property
    def cells(self) -> list[Cell]:
        """The images of the grid."""
        return [] if self.shown is None else cells(self.shown)

    @property
    def num_drawn(self) -> int:
        """Points that are drawn one by one."""
        return 0 if self.shown is None else len(drawn(self.shown))

    @cached_property
    def found(self) -> Int64Array:
        """The points that the search finds, of all and not only of those that are drawn."""
        if self.shown is None or not self.query:
            return np.empty(0, np.int64)
        return matching(self.shown, self.query)

    @property
    def has_colour(self) -> bool:
        """Return whether any point has a value of the requested quantity."""
        return self.shown is not None and has(self.shown, self.colour)
