"""A whole map: vectors, a quick picture by principal components, then UMAP."""

import math
import time
from typing import Any

from explorer.data.background import Task
from explorer.data.map.points import MapPoints, has_plane, make_points
from explorer.data.map.projection import LEAST_FOR_UMAP
from explorer.data.map.source import of_features, of_run
from explorer.places import Places


class _TimeIsUpError(Exception):
    """UMAP has taken as long as it may."""


class _Until(Task[Any]):
    """Reports to another task what is being done, up to a time."""

    def __init__(self, task: Task[Any], end_s: float) -> None:
        super().__init__()
        self._task, self._end_s = task, end_s

    def tell(self, doing: str, done: int = 0, total: int = 0) -> None:
        self._task.tell(doing, done, total)
        if time.monotonic() > self._end_s:
            raise _TimeIsUpError


def make_map(
    places: Places, run: str | None, task: Task[MapPoints], *, network: str | None = None, umap_s: float = math.inf
) -> MapPoints:
    """Make the map of a run's visual vectors, or of the store's features; the quick picture is `task.early`.

    `network`: which E of a run that has several, by default the first. `umap_s`: UMAP, if it has not been computed
    before, may take so long; else the quick picture is all there is. Raises as what it is made of does.
    """
    vectors = of_features(places, task) if run is None else of_run(places, run, task, network)
    if vectors.count < LEAST_FOR_UMAP:
        return make_points(places, vectors, "pca", task)
    if has_plane(vectors, "umap"):
        return make_points(places, vectors, "umap", task)
    task.early = make_points(places, vectors, "pca", task)
    try:
        return make_points(places, vectors, "umap", _Until(task, time.monotonic() + umap_s)) if umap_s else task.early
    except _TimeIsUpError:
        return task.early
