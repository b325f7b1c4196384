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
from explorer.errors import ExplorerError, tried
from explorer.html.query import Paging, choice, day, whole, whole_in
from explorer.html.query import snapshot as asked_snapshot
from explorer.html.site import NavItem, PageKind, Question, Site
from explorer.problems import Problem
from featurestore import log
from featurestore.errors import UserError
from featurestore.staging import QUARANTINE
from featurestore.store import FeatureStore, Snapshot
from featurestore.text import one_line

PER_PAGE, SNAPSHOTS_PER_PAGE = 48, 40


class SnapshotsCompared(NamedTuple):
    """Two snapshots that a page compares, the older one first, and a sentence about them."""

    old: Snapshot
    new: Snapshot
    note: str = ""


class StorePages(PageKind):
    """Pages below /store. A page loads its slow parts by `wait=PART`."""

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
        self._rows: LruCache[int] = LruCache(100)

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
        lines, pins_problem = None, ""
        if self.waits(request, "line") or self._timeline.is_quick(store, shown, snapshot.manifest.num_files):
            lines, pins_problem = tried(lambda: self._timeline.lines(store, shown))
            lines = lines or []
        rows, num_broken = live_rows(snapshot), None if store.storage.list(QUARANTINE) else 0
        counts_problem = ""
        if self.waits(request, "counts"):
            try:
                rows = self._rows.get(name_of(snapshot), lambda: snapshot.num_rows)
                num_broken = len(store.quarantine_rows())
            except UserError as error:
                counts_problem = one_line(error)
        return self._page(
            request,
            "overview",
            "Store",
            snapshot,
            store=store,
            lines=lines,
            line_figure=self._line_figure,
            pins_problem=pins_problem,
            paging=paging,
            num_images=rows,
            num_broken=num_broken,
            counts_problem=counts_problem,
            yesterday=_yesterday(),
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
        return self._page(
            request,
            "snapshot",
            f"Snapshot {number}",
            new,
            line=lines[0] if lines else None,
            before=before,
            earlier=next((each for each in reversed(known) if each < number), None),
            later=next((each for each in known if each > number), None),
            **self._difference(request, difference, {"against": whole(request, "against")}),
        )

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
        return self._page(
            request,
            "arrived",
            f"Arrived since {_day_text(since)}",
            newest,
            since=_field_text(since),
            until=_field_text(until) if until else "",
            **self._difference(request, SnapshotsCompared(old, new, note), params),
        )

    def broken(self, request: Request) -> Response:
        """Show the images that the store could not import, newest first."""
        store, snapshot = self._open(request)
        rows = store.quarantine_rows()[::-1]
        paging = Paging.of(request, len(rows), PER_PAGE)
        images = rows[paging.first : paging.first + PER_PAGE]
        common = sorted(Counter(row.reason for row in rows).items(), key=lambda item: (-item[1], item[0]))[:10]
        return self._page(request, "broken", "Broken images", snapshot, images=images, paging=paging, reasons=common)

    def _open(self, request: Request, version: int | None = None) -> tuple[FeatureStore, Snapshot]:
        assert self.site.places.store is not None
        store = FeatureStore.open(self.site.places.store)
        return store, open_snapshot(store, asked_snapshot(request) if version is None else version)

    def _difference(
        self, request: Request, difference: SnapshotsCompared | None, params: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the values for the template of differences: counts, if they are computed, and images of one kind."""
        kind: Any = choice(request, "kind", KINDS)
        shown: dict[str, Any] = {
            "difference": difference,
            "kind": kind,
            "asked_kind": request.query_params.get("kind"),
            "kinds": KINDS,
            "params": params,
            "counts": None,
            "images": [],
            "paging": Paging.of(request, 0, PER_PAGE),
            "problem": "",
        }
        if difference is None:
            return shown
        old, new, _ = difference
        try:
            counts = self._changes.peek(old, new)
            if counts is None and self.waits(request, "changes"):
                counts = self._changes.count(old, new)
            if counts is not None:
                if request.query_params.get("kind") is None:
                    kind = next((each for each in KINDS if counts.total(each)), kind)
                paging = Paging.of(request, counts.total(kind), PER_PAGE)
                images = self._changes.page(old, new, kind, paging.first, PER_PAGE)
                shown |= {"counts": counts, "kind": kind, "paging": paging, "images": images}
        except UserError as error:
            shown["problem"] = one_line(error)
        return shown

    def _line_figure(self, lines: Sequence[Any]) -> dict[str, Any]:
        """Draw the rows in files of snapshots over time; a click leads to the snapshot. Called by templates."""
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

    def _page(self, request: Request, template: str, title: str, snapshot: Snapshot, **context: Any) -> Response:
        return self.site.page(
            request,
            f"store/{template}.html",
            title=title,
            snapshot=snapshot,
            manifest=snapshot.manifest,
            info=snapshot.info,
            version=asked_snapshot(request),
            part=template,
            **context,
        )


def _yesterday() -> str:
    return f"{datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1):%Y-%m-%d}"


def _day_text(time: datetime.datetime) -> str:
    """Format a day, with the time unless it is midnight."""
    time = time.astimezone(datetime.UTC)
    return f"{time:%Y-%m-%d}" if (time.hour, time.minute, time.second) == (0, 0, 0) else f"{time:%Y-%m-%dT%H:%M:%S}"


def _field_text(time: datetime.datetime) -> str:
    """Format a time for a field of a form."""
    return f"{time.astimezone(datetime.UTC):%Y-%m-%dT%H:%M:%S}"
