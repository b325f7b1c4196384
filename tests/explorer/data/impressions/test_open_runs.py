"""Runs that are opened to be asked: what is left of one that is closed."""

import gc
import weakref

from explorer.data.impressions.open_runs import TrainedRuns
from tests.explorer.world import World


def test_a_closed_run_leaves_no_tables_also_where_something_refers_to_it(world: World) -> None:
    """Without the garbage collector, which may come an hour later; pages refer to the runs that they show."""
    runs = TrainedRuns(world.places())
    gc.disable()
    try:
        with runs.use("both") as opened:
            tables = [weakref.ref(table) for table in opened.trained.engine.tables.values()]
            assert tables and all(table() is not None for table in tables)
        runs.close()
        assert all(table() is None for table in tables)
        assert opened.sees_images
    finally:
        gc.enable()
