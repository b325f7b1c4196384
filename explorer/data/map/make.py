"""A whole map: vectors, a quick picture by principal components, then UMAP."""

from explorer.data.background import Task
from explorer.data.map.points import MapPoints, has_plane, make_points
from explorer.data.map.projection import LEAST_FOR_UMAP
from explorer.data.map.source import of_features, of_run
from explorer.places import Places


def make_map(
    places: Places, run: str | None, task: Task[MapPoints], *, network: str | None = None, quick: bool = False
) -> MapPoints:
    """Make the map of a run's visual vectors, or of the store's features; the quick picture is `task.early`.

    `network`: which E of a run that has several, by default the first.
    `quick`: only what is there in seconds: UMAP if it has been computed before. Raises as what it is made of does.
    """
    vectors = of_features(places, task) if run is None else of_run(places, run, task, network)
    if vectors.count < LEAST_FOR_UMAP:
        return make_points(places, vectors, "pca", task)
    if not has_plane(vectors, "umap"):
        task.early = make_points(places, vectors, "pca", task)
        if quick:
            return task.early
    return make_points(places, vectors, "umap", task)
