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
from explorer.html.site import NavItem, PageKind, Question, Site
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
        query = _query(request)
        task = self._catalogue(store, snapshot)
        catalogue, paging, images = None, Paging.of(request, 0, PER_PAGE), []
        if self.await_task(request, "images", task):
            catalogue = task.result()
            found = self._lists.get((task.name, query), partial(catalogue.find, query))
            paging = Paging.of(request, len(found), PER_PAGE)
            images = catalogue.images(found[paging.first : paging.first + PER_PAGE])
        return self._page(
            request,
            "found",
            f"Images with {query.text[:60]}" if query.text else "Images",
            snapshot,
            task=task,
            catalogue=catalogue,
            query=query,
            params=_params(query),
            paging=paging,
            images=images,
            sorts=SORTS,
            network=store.info.network,
            runs=image_runs(self.site.places),
        )

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
        uri = image.uri
        figures = begin(self.site.places, self.site.background)
        self.await_task(request, "figures", figures)
        runs = image_runs(self.site.places)
        run = self._run(request.query_params.get("run"), runs)
        spaces: list[Space] = []
        if here is not None and self._wants_spaces(request, snapshot):
            feature_1D, problem = tried(lambda: snapshot.get([key]))
            spaces = [Space(name="features", problem=problem)]
            if feature_1D is not None:  # else the image's own feature cannot be read
                spaces = self._spaces(request, snapshot, SoughtFeature(feature_1D, key, run))
        return self._page(
            request,
            "image",
            uri.rpartition("/")[2] or uri,
            snapshot,
            key=key,
            uri=uri,
            found=here,
            broken=broken,
            figures=figures,
            figures_of=figures.result().of(np.array([key])) if figures.is_ended else None,
            runs=runs,
            run=run,
            large=LARGE,
            **_compared(spaces),
        )

    async def like(self, request: Request) -> Response:
        """Show the neighbours of an uploaded picture, which is not stored."""
        data, fields = await read_upload(request, "picture", MOST_BYTES)
        try:
            await asyncio.wait_for(self._network.acquire(), _BUSY_S)
        except TimeoutError:
            return self.site.page(request, "error.html", title="Busy", status=503, message=Problem.BUSY.of())
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
        spaces = self._spaces(request, snapshot, SoughtFeature(feature_1D, None, run))
        picture = base64.b64encode(shrunk(data, LARGE).jpeg).decode()
        return self._page(
            request, "like", "Images like yours", snapshot, picture_jpeg=picture, key=None, run=run, **_compared(spaces)
        )

    def _spaces(self, request: Request, snapshot: Snapshot, asked: SoughtFeature) -> list[Space]:
        """Find the neighbours in both spaces; an error in one becomes its sentence."""
        features, problem = tried(lambda: self._in_features(snapshot, asked))
        visual, problem_of_visual = tried(lambda: self._in_visual(request, snapshot, asked))
        return [
            features or Space(name="features", problem=problem),
            visual or Space(name="visual", problem=problem_of_visual),
        ]

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

    def _in_visual(self, request: Request, snapshot: Snapshot, asked: SoughtFeature) -> Space:
        if asked.run is None:
            return Space(name="visual", problem=Problem.NEEDS_RUN_OF_IMAGES.of())
        task = begin_vectors(self.site.places, asked.run, snapshot, self.site.background)
        if asked.key is None:
            task.wait(_PATIENCE_S)
        if not self.await_task(request, "vectors", task):
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

    def _wants_spaces(self, request: Request, snapshot: Snapshot) -> bool:
        if not self.site.frozen:
            return request.query_params.get("wait") in ("spaces", "vectors")
        return snapshot.manifest.file_rows * snapshot.info.row_bytes <= _FROZEN_BYTES

    def _open(self, request: Request) -> tuple[FeatureStore, Snapshot]:
        assert self.site.places.store is not None
        store = FeatureStore.open(self.site.places.store)
        return store, open_snapshot(store, asked_snapshot(request))

    def _page(self, request: Request, template: str, title: str, snapshot: Snapshot, **context: Any) -> Response:
        version = asked_snapshot(request)
        return self.site.page(
            request, f"images/{template}.html", title=title, snapshot=snapshot, version=version, **context
        )


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


def _compared(spaces: Sequence[Space]) -> dict[str, Any]:
    """Return the values for the template of neighbours."""
    awaited = next((space.task for space in spaces if space.task is not None), None)
    return {"spaces": spaces, "overlap": overlap(spaces), "awaited": awaited}
