"""Pages of images: search and browsing, one image with its neighbours, and uploaded pictures."""

import asyncio
import base64
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from explorer.data.ads import begin
from explorer.data.background import Task
from explorer.data.cache import LruCache
from explorer.data.catalogue import SORTS, Catalogue, ImageQuery, make_catalogue
from explorer.data.neighbours import Neighbours, Space, nearest_features, nearest_vectors, overlap
from explorer.data.pictures import shrunk
from explorer.data.snapshots import find_key, name_of, open_snapshot
from explorer.data.visual import MOST_BYTES, begin_vectors, embed, feature_of_picture, image_runs
from explorer.errors import ExplorerError, NotHereError, tried
from explorer.html.query import Paging, choice, read_upload, whole_in
from explorer.html.query import snapshot as asked_snapshot
from explorer.html.site import LOOK_S, NavItem, PageKind, Part, Question, Site
from explorer.problems import Problem
from featurestore.store import FeatureStore, Snapshot

PER_PAGE = 48
NUM_NEIGHBOURS = 12
LARGE = 800
_KEY_FROM = -(1 << 63)
_FROZEN_BYTES = 64 << 20
"""Largest features of a store for which neighbours are exported; for more, the export would take hours."""
_LIST_BYTES = 32 << 20
"""Lists of images, sorted and filtered, that are cached take as much memory together: 8 of a million images."""
_BUSY_S = 60.0
"""Seconds that an uploaded picture waits for others before it."""
_PATIENCE_S = 10.0
"""Seconds to wait for visual vectors for an uploaded picture, which the user would have to send again."""


class SoughtFeature(NamedTuple):
    """The query of a neighbour search: a stored feature, (1, D), and its key if the store has it."""

    feature_1D: NDArray[Any]
    key: int | None
    run: str | None


class ImagePages(PageKind):
    """Pages below /images, of a store."""

    needs = "store"
    nav = NavItem("Images", "/images")
    questions = (
        Question(
            "What is an image similar to?",
            "/images",
            "Search, filter and sort all images; then its neighbours by features, and by what a run has learned.",
        ),
    )

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._features: LruCache[Neighbours] = LruCache(500)
        self._lists: LruCache[NDArray[np.int32]] = LruCache(_LIST_BYTES, lambda rows: rows.nbytes)
        self._network = asyncio.Lock()

    def routes(self) -> Sequence[Route]:
        """List the routes: search, one image, and neighbours of an uploaded picture."""
        upload = [] if self.site.frozen else [Route("/images/like", self.like, methods=["POST"])]
        return [Route("/images", self.search), *upload, Route("/images/{key}", self.image)]

    def search(self, request: Request) -> Response:
        """Show the images, all or those that are searched for, in the requested order."""
        store, snapshot = self._open(request)
        query, task = _query(request), self._catalogue(store, snapshot)
        Paging.of(request, 0, PER_PAGE)  # so that a page that is none is refused before the list is there

        def found() -> dict[str, Any]:
            catalogue = task.result()
            rows = self._lists.get((task.name, query), partial(catalogue.find, query))
            paging = Paging.of(request, len(rows), PER_PAGE)
            images = catalogue.images(rows[paging.first : paging.first + PER_PAGE])
            asked = {"query": query, "params": _params(query), "sorts": SORTS}
            given = {"network": store.info.network, "runs": image_runs(self.site.places)}
            return {"catalogue": catalogue, "paging": paging, "images": images, **asked, **given}

        title = f"Images with {query.text[:60]}" if query.text else "Images"
        part = Part(template="images/found.html", values=found, task=task, what="Listing all images")
        return self._page(request, title, snapshot, part)

    def _catalogue(self, store: FeatureStore, snapshot: Snapshot) -> Task[Catalogue]:
        """Start to list all images of a snapshot, or return the task of before."""
        figures = begin(self.site.places, self.site.background)

        def work(task: Task[Catalogue]) -> Catalogue:
            task.tell("reads the test samples")
            return make_catalogue(store, snapshot, figures.result(), task)

        return self.site.background.task(repr(("images", name_of(snapshot), figures.name)), work)

    def image(self, request: Request) -> Response:
        """Show one image, or a broken one: the picture and its neighbours."""
        if request.path_params["key"] == "like":  # someone opened the address of the form
            raise HTTPException(405, Problem.NOT_SENT.of())
        try:
            key = whole_in(request.path_params["key"], "key", least=_KEY_FROM)
        except NotHereError as error:
            raise NotHereError(Problem.NO_IMAGE, request.path_params["key"][:40]) from error
        store, snapshot = self._open(request)
        here = find_key(snapshot, key)
        broken = next((row for row in store.quarantine_rows() if row.key == key), None) if here is None else None
        image = here or broken
        if image is None:
            raise NotHereError(Problem.NO_IMAGE_IN_SNAPSHOT, key, snapshot.version)
        uri, figures, runs = image.uri, begin(self.site.places, self.site.background), image_runs(self.site.places)
        about = {"key": key, "uri": uri, "found": here, "broken": broken, "large": LARGE}
        parts = [
            Part(template="images/image.html", values=about),
            Part(
                template="images/figures.html",
                values=lambda: {"figures": figures.result().of(np.array([key]))},
                task=figures,
                what="Counting impressions",
            ),
        ]
        run = self._run(request.query_params.get("run"), runs)
        if here is not None:
            is_left_out = self.site.frozen and snapshot.manifest.file_rows * snapshot.info.row_bytes > _FROZEN_BYTES
            seen_by = {"runs": runs, "is_left_out": is_left_out}
            parts.append(Part(template="images/nearest.html", values=seen_by))
            if not is_left_out:
                parts.append(
                    Part(
                        template="images/spaces.html",
                        values=lambda: self._spaces(snapshot, SoughtFeature(snapshot.get([key]), key, run)),
                        is_quick=False,
                        what="Comparing with all images",
                    )
                )
        return self._page(request, uri.rpartition("/")[2] or uri, snapshot, *parts, run=run)

    async def like(self, request: Request) -> Response:
        """Show the neighbours of an uploaded picture, which is not stored."""
        data, fields = await read_upload(request, "picture", MOST_BYTES)
        try:
            await asyncio.wait_for(self._network.acquire(), _BUSY_S)
        except TimeoutError:
            message = Part(template="error.html", values={"message": Problem.BUSY.of()})
            return self.site.page(request, "Busy", message, status=503)
        try:
            return await run_in_threadpool(self._like, request, data, fields.get("run") or None)
        finally:
            self._network.release()

    def _like(self, request: Request, data: bytes, asked_run: str | None) -> Response:
        store, snapshot = self._open(request)
        if not snapshot.version:
            raise ExplorerError(Problem.EMPTY_STORE)
        feature_1D = feature_of_picture(store, data)
        runs = image_runs(self.site.places)
        run = self._run(asked_run, runs)
        spaces = self._spaces(snapshot, SoughtFeature(feature_1D, None, run))
        picture = base64.b64encode(shrunk(data, LARGE).jpeg).decode()
        return self._page(
            request,
            "Images like yours",
            snapshot,
            Part(template="images/like.html", values={"picture_jpeg": picture}),
            Part(template="images/spaces.html", values=spaces),
            run=run,
        )

    def _spaces(self, snapshot: Snapshot, asked: SoughtFeature) -> dict[str, Any]:
        """Find the neighbours in both spaces, for their template; an error in one becomes its sentence."""
        features, problem = tried(lambda: self._in_features(snapshot, asked))
        visual, problem_of_visual = tried(lambda: self._in_visual(snapshot, asked))
        spaces = [
            features or Space(name="features", problem=problem),
            visual or Space(name="visual", problem=problem_of_visual),
        ]
        is_awaited = asked.key is not None and any(space.task is not None for space in spaces)
        return {"spaces": spaces, "overlap": overlap(spaces), "key": asked.key, "again_s": 1 if is_awaited else None}

    def _in_features(self, snapshot: Snapshot, asked: SoughtFeature) -> Space:
        query_D = snapshot.codec.decode(asked.feature_1D)[0]
        name = (name_of(snapshot), query_D.tobytes())
        found = self._features.get(name, lambda: nearest_features(snapshot, query_D, NUM_NEIGHBOURS + 1))
        found = found.without(asked.key, NUM_NEIGHBOURS)
        how = f"Cosine of features of {snapshot.info.width_text} numbers, "
        if found.is_exact:
            how += f"exactly, among all {found.num_rows:,} images."
        else:
            how += f"among {found.num_searched:,} of {found.num_rows:,} images at random, as all would take too long."
        return Space(name="features", found=found, how=how)

    def _in_visual(self, snapshot: Snapshot, asked: SoughtFeature) -> Space:
        if asked.run is None:
            return Space(name="visual", problem=Problem.NEEDS_RUN_OF_IMAGES.of())
        task = begin_vectors(self.site.places, asked.run, snapshot, self.site.background)
        if not self.site.wait_for(task, _PATIENCE_S if asked.key is None else LOOK_S):
            return Space(name="visual", task=task)
        vectors = task.result()
        if asked.key is None:
            query_V = embed(self.site.places, asked.run, snapshot, asked.feature_1D)[0]
        else:
            found_V = vectors.of(asked.key)
            if found_V is None:
                raise ExplorerError(Problem.NO_VECTOR)
            query_V = found_V
        found = nearest_vectors(snapshot, vectors.blocks(), query_V, NUM_NEIGHBOURS + 1)
        found = found.without(asked.key, NUM_NEIGHBOURS)
        how = (
            f"Cosine of the {len(query_V)} numbers that the run {asked.run} ({vectors.about['checkpoint']}) makes of "
            f"each image, exactly, among all {found.num_rows:,} images."
        )
        return Space(name="visual", found=found, how=how)

    def _run(self, asked: str | None, runs: list[str]) -> str | None:
        if asked and asked not in runs:
            raise NotHereError(Problem.NO_RUN_OF_IMAGES, asked[:60])
        return asked or (runs[0] if runs else None)

    def _open(self, request: Request) -> tuple[FeatureStore, Snapshot]:
        assert self.site.places.store is not None
        store = FeatureStore.open(self.site.places.store)
        return store, open_snapshot(store, asked_snapshot(request))

    def _page(self, request: Request, title: str, snapshot: Snapshot, *parts: Part, **shared: Any) -> Response:
        version = asked_snapshot(request)
        shown = [] if version is None else [Part(template="images/version.html")]
        return self.site.page(request, title, *shown, *parts, snapshot=snapshot, version=version, **shared)


def _query(request: Request) -> ImageQuery:
    """Read what is asked of the list. Raises ExplorerError."""
    given = request.query_params
    return ImageQuery(
        text=given.get("q", "").strip()[:2_000],
        folder=given.get("folder", ""),
        category=given.get("category", ""),
        is_new=choice(request, "new", ("no", "yes")) == "yes",
        sort=choice(request, "sort", tuple(SORTS)),  # type: ignore[arg-type]
    )


def _params(query: ImageQuery) -> dict[str, str]:
    """Write the parameters of the address of a list, without its page."""
    new = "yes" if query.is_new else ""
    asked = {"q": query.text, "folder": query.folder, "category": query.category, "new": new}
    asked["sort"] = "" if query.sort == "uri" else query.sort
    return {name: value for name, value in asked.items() if value}
