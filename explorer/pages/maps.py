"""The map: images in a plane, by the visual vectors of a run or the features of the store."""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import get_args

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from explorer.data.background import Task
from explorer.data.map import COLOURS, COLUMNS, Cell, Colour, MapPoints, cells, drawn, has, make_map
from explorer.data.projection import LEAST_FOR_UMAP
from explorer.data.runs.comparing import shown_first
from explorer.data.runs.folders import list_runs, open_run, read_facts
from explorer.errors import ExplorerError, NotHereError
from explorer.html import charts
from explorer.html.site import NavItem, PageKind, Question
from featurestore.errors import UserError
from featurestore.text import one_line

_MOST_RUNS = 30
"""Runs whose maps are offered: those that changed last."""
_STOP_POLLING = 286
_LOOK_S, _WAIT_S = 0.05, 60.0
"""Who has no scripts waits so long for a quick map, and asks again."""


class MapPages(PageKind):
    """The page at /map, the part of it that comes later, and its points as a file."""

    @property
    def nav(self) -> NavItem | None:
        """Where there are a store or runs."""
        places = self.site.places
        return NavItem("Map", "/map") if places.store is not None or places.runs is not None else None

    @property
    def questions(self) -> Sequence[Question]:
        """Say what the map is for."""
        return [
            Question(
                "What has a run learned of all images?",
                "/map",
                "Images in a plane, near where they are alike; by click-through rate, category or error.",
            )
        ]

    def routes(self) -> Sequence[Route]:
        """Return the routes of the page, of its part and of its file."""
        if self.nav is None:
            return []
        return [
            Route("/map", self.map),
            Route("/parts/map", self.part),
            Route("/map/points.parquet", self.points),
        ]

    def map(self, request: Request) -> Response:
        """Show the map of what is asked for; what is not made yet comes later, or is waited for (wait=1)."""
        runs = self._runs()
        run, network, colour = self._asked(request, runs)
        if run is None and self.site.places.store is None:
            return self.site.page(request, "map/none.html", title="Map")
        part = self._part(run, network, colour)
        begun_s = time.monotonic()
        if self.site.frozen:
            self._finish(part)
        waits_s = _WAIT_S if request.query_params.get("wait") == "1" else 0.0
        while part.shown is None and not part.problem and time.monotonic() - begun_s < waits_s:
            time.sleep(_LOOK_S)
            part = replace(part)
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
            image_link=self._image_link,
        )

    def _finish(self, part: "MapPart") -> None:
        """Wait for the map of an export; note where UMAP has not laid it out."""
        begun_s, site = time.monotonic(), self.site
        site.finish(part.task)
        site.umap_s = max(0.0, site.umap_s - (time.monotonic() - begun_s))
        name = " ".join(filter(None, (part.run, part.network))) or "the features of the store"
        shown = part.shown
        is_quick = shown is not None and shown.method == "pca" and len(shown.keys_N) >= LEAST_FOR_UMAP
        if is_quick and name not in site.quick_maps:
            site.quick_maps.append(name)

    def part(self, request: Request) -> Response:
        """Give the map as far as it is; for the last time when it is whole."""
        part = self._part(*self._asked(request, ()))
        if not part.is_ended and part.shown is not None and request.query_params.get("shown") == part.shown.method:
            answer = self.site.page(request, "map/status.html", title="Map", part=part)
            answer.headers["HX-Retarget"] = "#map-status"  # the map that is shown stays as it is
            return answer
        return self.site.page(
            request,
            "map/part.html",
            title="Map",
            part=part,
            maps=charts,
            image_link=self._image_link,
            status=_STOP_POLLING if part.is_ended else 200,
        )

    def points(self, request: Request) -> Response:
        """Give the points as Parquet."""
        run, network, colour = self._asked(request, ())
        shown = self._part(run, network, colour).shown
        if shown is None:
            raise NotHereError("the map is not made yet; look at its page first")
        of = "-".join(filter(None, (run or "features", network)))
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"map-{of}-{shown.method}.parquet")
        return FileResponse(shown.file, filename=name, media_type="application/vnd.apache.parquet")

    def _image_link(self, key: int) -> str | None:
        """Write the address of an image's page; None in an export, which would get a page for every point."""
        return None if self.site.frozen or self.site.places.store is None else self.site.url(f"/images/{key}")

    def _runs(self) -> list[str]:
        """Name the runs that see images and have a checkpoint, the one first that is shown first."""
        if self.site.places.runs is None:
            return []
        runs, _ = list_runs(self.site.places, 1, _MOST_RUNS)
        seeing = [run for run in runs if run.checkpoints and run.images not in ("", "none")]
        return [run.name for run in sorted(seeing, key=lambda run: shown_first(run.name, run.images))]

    def _asked(self, request: Request, runs: Sequence[str]) -> tuple[str | None, str | None, Colour]:
        """Read which run, None for the features of the store, which E of it, and which colour are asked for."""
        of, colour = request.query_params.get("run"), request.query_params.get("colour", "folder")
        if colour not in get_args(Colour):
            raise ExplorerError(f"colour={colour[:40]!r} is none of {', '.join(COLOURS)}")
        named: Colour = colour  # type: ignore[assignment]
        if of:
            open_run(self.site.places, of)
        elif of is None and runs:
            of = runs[0]
        if not of and request.url.path != "/map" and self.site.places.store is None:
            raise NotHereError("there is no --store whose features could be shown")
        network = request.query_params.get("network") or None
        return of or None, network if of else None, named

    def _part(self, run: str | None, network: str | None, colour: Colour) -> "MapPart":
        """Begin the map, or look how far it is."""
        places, umap_s = self.site.places, self.site.umap_s if self.site.frozen else math.inf
        identity, store_id = "", None
        if run is not None:
            identity = read_facts(open_run(places, run)).checkpoint
        if places.store is not None:
            from featurestore.store import FeatureStore

            snapshot = FeatureStore.open(places.store).snapshot()
            identity, store_id = f"{identity} {snapshot.version}", snapshot.info.store_id
        task: Task[MapPoints] = self.site.background.task(
            repr(("map", run, network, identity)),
            lambda task: make_map(places, run, task, network=network, umap_s=umap_s),
        )
        return MapPart(run=run, network=network, colour=colour, task=task, store_id=store_id)


@dataclass(kw_only=True)
class MapPart:
    """A map as far as it is when it is first looked at: one answer shows one state of it."""

    run: str | None
    network: str | None
    """Which E of the run is asked for; None: the first."""
    colour: Colour
    task: Task[MapPoints]
    store_id: str | None
    """Of the store whose images have pages; None where none was given."""

    @cached_property
    def is_ended(self) -> bool:
        """Tell whether nothing more comes."""
        return self.task.is_ended

    @property
    def problem(self) -> str:
        """Why there is no map, or none by UMAP."""
        error = self.task.error if self.is_ended else None
        if error is None or isinstance(error, UserError):
            return "" if error is None else one_line(error)
        raise error

    @cached_property
    def shown(self) -> MapPoints | None:
        """The best map that there is."""
        return self.task.result() if self.is_ended and self.task.error is None else self.task.early

    @property
    def networks(self) -> list[str]:
        """The networks E to choose from; empty where there are not several."""
        found: list[str] = [] if self.shown is None else self.shown.about["networks"]
        return found if len(found) > 1 else []

    @property
    def has_pages(self) -> bool:
        """Tell whether the images are those of the store, so that each has a page."""
        return self.shown is not None and self.store_id == self.shown.about["store_id"]

    @property
    def cells(self) -> list[Cell]:
        """The images of the grid."""
        return [] if self.shown is None else cells(self.shown)

    @property
    def columns(self) -> int:
        """Columns of the grid."""
        return COLUMNS

    @property
    def num_drawn(self) -> int:
        """Points that are drawn one by one."""
        return 0 if self.shown is None else len(drawn(self.shown))

    @property
    def has_colour(self) -> bool:
        """Tell whether anything is known of the quantity that is asked for."""
        return self.shown is not None and has(self.shown, self.colour)
