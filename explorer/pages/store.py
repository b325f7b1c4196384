"""Pages of a feature store: its snapshots and their changes, and broken images."""

import datetime
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from explorer.data.cache import LruCache
from explorer.data.snapshots import (
    KINDS,
    Changes,
    Timeline,
    live_rows,
    name_of,
    newest_at,
    open_snapshot,
    version_before,
)
from explorer.errors import ExplorerError
from explorer.html.query import Paging, choice, day, whole, whole_in
from explorer.html.query import snapshot as asked_snapshot
from explorer.html.site import NavItem, PageKind, Part, Question, Site
from explorer.problems import Problem
from featurestore import log
from featurestore.staging import QUARANTINE
from featurestore.store import FeatureStore, Snapshot

PER_PAGE, SNAPSHOTS_PER_PAGE = 48, 40


class SnapshotsCompared(NamedTuple):
    """Two snapshots that a page compares, the older one first, and a sentence about them."""

    old: Snapshot
    new: Snapshot
    note: str = ""


class StorePages(PageKind):
    """Pages below /store."""

    needs = "store"
    nav = NavItem("Store", "/store")
    questions = (
        Question(
            "Which images arrived since yesterday?",
            "/store/arrived",
            "Images added, changed and removed on a day, or in any period.",
        ),
        Question(
            "Which images are broken?",
            "/store/broken",
            "Images that could not be read or decoded: why, since when, and the file.",
        ),
    )

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._timeline, self._changes = Timeline(), Changes()
        self._counts: LruCache[int] = LruCache(100)

    def routes(self) -> Sequence[Route]:
        """List a page for each question."""
        return [
            Route("/store", self.overview),
            Route("/store/snapshots/{number}", self.snapshot),
            Route("/store/arrived", self.arrived),
            Route("/store/broken", self.broken),
        ]

    def overview(self, request: Request) -> Response:
        """Show the store's contents, and a timeline of its snapshots, from manifests alone."""
        store, snapshot = self._open(request)
        known = log.versions(store.storage)[::-1]
        paging = Paging.of(request, len(known), SNAPSHOTS_PER_PAGE)
        shown = known[paging.first : paging.first + SNAPSHOTS_PER_PAGE]
        broken = (store.info.store_id, *store.storage.list(QUARANTINE))  # files that are named by their content
        rows = live_rows(snapshot)
        is_counted = rows is not None or self._counts.peek(name_of(snapshot)) is not None

        def counts() -> dict[str, Any]:
            num_images = self._counts.get(name_of(snapshot), lambda: snapshot.num_rows) if rows is None else rows
            num_broken = self._counts.get(broken, lambda: len(store.quarantine_rows()))
            return {"num_images": num_images, "num_broken": num_broken}

        def line() -> dict[str, Any]:
            lines = self._timeline.lines(store, shown)
            return {"lines": lines, "figure": self._line_figure(lines), "paging": paging}

        about = {"store": store, "manifest": snapshot.manifest, "info": snapshot.info, "yesterday": _yesterday()}
        is_quick = self._timeline.is_quick(store, shown, snapshot.manifest.num_files)
        return self._page(
            request,
            "Store",
            snapshot,
            Part(template="store/overview.html", values=about),
            Part(
                template="store/counts.html",
                values=counts,
                is_quick=is_counted and (len(broken) == 1 or self._counts.peek(broken) is not None),
                what="Counting images",
            ),
            Part(
                template="store/line.html",
                values=line,
                heading="Snapshots",
                is_quick=is_quick,
                what="Reading what each commit did",
            ),
            has_charts=True,
        )

    def snapshot(self, request: Request) -> Response:
        """Show the images added, changed and removed in a snapshot, compared with the previous or any other one."""
        number = whole_in(request.path_params["number"], "snapshot")
        store, new = self._open(request, number)
        before = whole(request, "against", version_before(store, number))
        known = log.versions(store.storage)
        difference = None
        if before is not None:
            gap = (
                f"The snapshots between {before} and {number} have expired or were purged. "
                "These are the changes of all of them together."
            )
            is_gap = request.query_params.get("against") is None and before < number - 1
            difference = SnapshotsCompared(open_snapshot(store, before), new, gap if is_gap else "")
        lines = self._timeline.lines(store, [number]) if number in known else []
        shown = {
            "line": lines[0] if lines else None,
            "before": before,
            "earlier": next((each for each in reversed(known) if each < number), None),
            "later": next((each for each in known if each > number), None),
        }
        changes = self._changed(request, difference, {"against": whole(request, "against")})
        about = Part(template="store/snapshot.html", values=shown)
        return self._page(request, f"Snapshot {number}", new, about, *([changes] if number else []))

    def arrived(self, request: Request) -> Response:
        """Show the images added, changed and removed since a day, up to now or to another day."""
        store, newest = self._open(request)
        since = day(request, "since") or datetime.datetime.fromisoformat(f"{_yesterday()}T00:00:00+00:00")
        until = day(request, "until")
        if until is not None and until <= since:
            raise ExplorerError(Problem.NOT_LATER, _day_text(until), _day_text(since))
        start = newest_at(store, since.timestamp())
        new = newest if until is None else newest_at(store, until.timestamp()).snapshot
        kept = f"These are the changes since snapshot {start.snapshot.version}."
        note = "" if start.is_exact else f"Snapshots from then have expired or were purged. {kept}"
        old = min(start.snapshot, new, key=lambda snapshot: snapshot.version)
        params = {
            "since": _day_text(since),
            "until": _day_text(until) if until else None,
            "version": asked_snapshot(request),
        }
        shown = {"since": _field_text(since), "until": _field_text(until) if until else ""}
        asked = Part(template="store/arrived.html", values=shown)
        changes = self._changed(request, SnapshotsCompared(old, new, note), params)
        return self._page(request, f"Arrived since {_day_text(since)}", newest, asked, changes)

    def broken(self, request: Request) -> Response:
        """Show the images that the store could not import, newest first."""
        store, snapshot = self._open(request)
        rows = store.quarantine_rows()[::-1]
        paging = Paging.of(request, len(rows), PER_PAGE)
        images = rows[paging.first : paging.first + PER_PAGE]
        common = sorted(Counter(row.reason for row in rows).items(), key=lambda item: (-item[1], item[0]))[:10]
        shown = {"images": images, "paging": paging, "reasons": common}
        return self._page(request, "Broken images", snapshot, Part(template="store/broken.html", values=shown))

    def _open(self, request: Request, version: int | None = None) -> tuple[FeatureStore, Snapshot]:
        assert self.site.places.store is not None
        store = FeatureStore.open(self.site.places.store)
        return store, open_snapshot(store, asked_snapshot(request) if version is None else version)

    def _changed(self, request: Request, difference: SnapshotsCompared | None, params: dict[str, Any]) -> Part:
        """Return the part that shows counts of changes, and images of one kind. `params`: of its links."""
        asked: Any = choice(request, "kind", KINDS)
        if difference is None:
            return Part(template="store/changes.html", values={"difference": None})
        old, new, _ = difference

        def values() -> dict[str, Any]:
            counts, kind = self._changes.count(old, new), asked
            if request.query_params.get("kind") is None:
                kind = next((each for each in KINDS if counts.total(each)), kind)
            paging = Paging.of(request, counts.total(kind), PER_PAGE)
            images = self._changes.page(old, new, kind, paging.first, PER_PAGE)
            found = {"counts": counts, "kind": kind, "paging": paging, "images": images}
            return {"difference": difference, "kinds": KINDS, "params": params, **found}

        return Part(
            template="store/changes.html",
            values=values,
            is_quick=self._changes.peek(old, new) is not None,
            what=f"Comparing snapshots {old.version} and {new.version}",
        )

    def _line_figure(self, lines: Sequence[Any]) -> dict[str, Any]:
        """Draw the rows in files of snapshots over time; a click leads to the snapshot."""
        there = [line for line in reversed(lines) if line.time_s is not None]
        times = [datetime.datetime.fromtimestamp(line.time_s, datetime.UTC) for line in there]
        names = [", ".join((*line.channels, *line.pins)) for line in there]
        return {
            "links": True,
            "data": [
                {
                    "type": "scatter",
                    "mode": "lines+markers+text",
                    "line": {"shape": "hv"},
                    "marker": {"size": 10},
                    "x": [f"{time:%Y-%m-%d %H:%M:%S}" for time in times],
                    "y": [line.file_rows for line in there],
                    "text": names,
                    "textposition": "top center",
                    "hovertext": [f"{line.version}: {line.operation}" for line in there],
                    "hovertemplate": "%{hovertext}<br>%{x}<br>%{y:,} rows<extra></extra>",
                    "customdata": [self.site.url(f"/store/snapshots/{line.version}") for line in there],
                }
            ],
            "layout": {"xaxis": {"type": "date"}, "yaxis": {"title": {"text": "rows in files"}, "rangemode": "tozero"}},
        }

    def _page(self, request: Request, title: str, snapshot: Snapshot, *parts: Part, **shared: Any) -> Response:
        tabs, version = Part(template="store/tabs.html"), asked_snapshot(request)
        return self.site.page(request, title, tabs, *parts, snapshot=snapshot, version=version, **shared)


def _yesterday() -> str:
    return f"{datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1):%Y-%m-%d}"


def _day_text(time: datetime.datetime) -> str:
    """Format a day, with the time unless it is midnight."""
    time = time.astimezone(datetime.UTC)
    return f"{time:%Y-%m-%d}" if (time.hour, time.minute, time.second) == (0, 0, 0) else f"{time:%Y-%m-%dT%H:%M:%S}"


def _field_text(time: datetime.datetime) -> str:
    """Format a time for a field of a form."""
    return f"{time.astimezone(datetime.UTC):%Y-%m-%dT%H:%M:%S}"
