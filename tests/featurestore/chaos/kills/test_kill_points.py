"""SIGKILL of a writer before and after each thing it does to files: all of its commit is seen afterwards, or none."""

import signal
from collections import Counter
from functools import partial
from typing import Any

import pytest

from featurestore import FeatureStore, log
from featurestore.storage.storage import Storage

DAY_S = 86400.0
EVERY = pytest.mark.parametrize(
    "every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["ends", "every point"]
)
URIS = [f"u{i}" for i in range(8)]


def prepared(arena) -> None:
    """A store with a base and a delta in each shard, and a tombstone."""
    actor = arena.actor("before")
    actor.put(URIS)
    actor.put([*URIS[:4], "v"])
    actor.delete(URIS[3:5])


def put(actor) -> None:
    actor.put([*URIS[2:6], "w0", "w1", "w2"])


def delete(actor) -> None:
    actor.delete(URIS[:6])


def extract(actor) -> None:
    actor.extract([*URIS[2:6], "w0", "w1", "w2"])


def compact(actor) -> None:
    actor.compact(force=True)


def restore(actor) -> None:
    actor.restore(1)


def expire(actor) -> None:
    actor.expire(keep_last=1, grace_s=7 * DAY_S)


def expire_when_old(actor) -> None:
    with pytest.MonkeyPatch.context() as patch:
        make_old(patch)
        expire(actor)


def die_everywhere(arena, work, make_fuse, trace, watch, num_commits: int = 1, every: bool = True) -> Counter[str]:
    """Run `work` on fresh copies of the store, once to its end and then to its death at every point; count the points.

    Unless `every`, it dies at the first and the last point of each name only.
    """
    num_before = len(arena.check())

    def run(at: int) -> tuple[Any, int | None]:
        twin = arena.twin()
        process = twin.start("writer", partial(run_with, make_fuse(at), work, watch), one_thread=True)
        process.join()
        found = len(twin.check())
        assert found in (num_before, num_before + num_commits)
        assert at or found == num_before + num_commits
        twin.actor("after").put(["u0", "x"])  # nothing that the dead left behind stops the living
        assert len(twin.check()) == found + 1
        return twin, process.exitcode

    whole, code = run(at=0)
    assert code == 0
    whole.discard()
    points = trace()
    chosen = range(len(points)) if every else sorted(ends_of(points))
    for deaths, point in enumerate(chosen):
        twin, code = run(point + 1)
        assert code == -signal.SIGKILL
        if deaths % 5 == 0:
            check_swept(twin)
        twin.discard()
    assert trace() == [points[point] for point in chosen]
    return Counter(points)


def ends_of(points: list[str]) -> set[int]:
    """Places of the first and the last point of each name."""
    last = {name: place for place, name in enumerate(points)}
    first = {name: len(points) - 1 - place for place, name in enumerate(reversed(points))}
    return {*first.values(), *last.values()}


def check_swept(arena) -> None:
    """In the end nothing is left of the dead: an expiry of all that is old leaves what the newest snapshot names."""
    with pytest.MonkeyPatch.context() as patch:
        make_old(patch)
        expire(arena.actor("sweeper"))
        expire(arena.actor("sweeper"))  # what only snapshots had that the first one took away
    arena.check()
    snapshot = arena.store.snapshot()
    named = [entry for files in snapshot.manifest.shards.values() for entry in files]
    expected = {entry.path for entry in named} | {entry.statistics_path for entry in named if entry.statistics_path}
    left = {entry.path for entry in arena.store.storage.entries()}
    assert left == expected | {"store.json", log.manifest_path(snapshot.version)}


def make_old(patch: pytest.MonkeyPatch) -> None:
    """As if all that is in a store were older by a month."""
    now = Storage.now
    patch.setattr(Storage, "now", lambda self: now(self) + 30 * DAY_S)


def run_with(fuse, work, watch, actor) -> None:
    watch(fuse, actor.store)
    actor.before_note = lambda event: fuse.point(f"note {event}")
    work(actor)


def watch_disk(fuse, store: FeatureStore) -> None:
    fuse.watch_disk(store.url)


def watch_s3_writes(fuse, store: FeatureStore) -> None:
    fuse.watch_s3({"put_object", "delete_object", "delete_objects", "copy_object"})


def watch_s3(fuse, store: FeatureStore) -> None:
    fuse.watch_s3()


@EVERY
@pytest.mark.parametrize("work", [put, delete, extract])
def test_on_disk(make_arena, make_fuse, trace, work, every: bool) -> None:
    arena = make_arena()
    prepared(arena)
    points = die_everywhere(arena, work, make_fuse, trace, watch_disk, every=every)
    assert points["open log temporary"] == points["os.link log temporary"] == points["os.remove log temporary"] == 1
    assert points["os.rename data temporary"] >= 2
    assert points["write half"] >= 3
    assert points["fsync"] >= 2 * points["write half"]  # the file, and then its folder
    assert points["note done"] == 1  # all is done, and nobody was told


@EVERY
@pytest.mark.parametrize("work", [compact, restore])
def test_of_compaction_and_restore(make_arena, make_fuse, trace, work, every: bool) -> None:
    arena = make_arena()
    prepared(arena)
    assert die_everywhere(arena, work, make_fuse, trace, watch_disk, every=every)["os.link log temporary"] == 1


@EVERY
def test_of_expiry(make_arena, make_fuse, trace, every: bool) -> None:
    """Also of one that finds files to delete, left by dead writers and by snapshots that went before."""
    arena = make_arena()
    prepared(arena)
    compact(arena.actor("compactor"))
    expire(arena.actor("expirer"))
    arena.store.storage.write_bytes("data/0000/.tmp-dead", b"half a fi")
    arena.actor("last").put(URIS[1:])
    points = die_everywhere(arena, expire_when_old, make_fuse, trace, watch_disk, num_commits=0, every=every)
    assert points["os.remove log"] == 1
    assert points["os.remove data"] >= 4
    assert points["os.remove expired"] >= 4


@pytest.mark.parametrize(
    "watch", [watch_s3_writes, pytest.param(watch_s3, marks=pytest.mark.slow)], ids=["writes", "every request"]
)
def test_on_s3(s3_url: str, make_arena, make_fuse, trace, watch) -> None:
    arena = make_arena(f"{s3_url}/store", num_shards=1 if watch is watch_s3_writes else 2)
    prepared(arena)
    points = die_everywhere(arena, put, make_fuse, trace, watch)
    assert points["before put_object"] == points["after put_object"] >= 2
