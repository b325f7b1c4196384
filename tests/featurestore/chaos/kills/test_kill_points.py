"""SIGKILL of a writer before and after each thing it does to files: all of its commit is seen afterwards, or none."""

from collections import Counter
from functools import partial

import pytest

from featurestore import FeatureStore
from featurestore import store as store_module

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


def die_everywhere(arena, work, make_fuse, watch) -> int:
    """Run `work` on a fresh copy of the store until it is through; how often it died before that."""
    for deaths in range(1000):
        twin = arena.twin()
        process = twin.start("writer", partial(run_with, make_fuse(deaths + 1), work, watch))
        process.join()
        before = len(twin.check())
        twin.actor("after").put(["u0", "x"])  # nothing that the dead left behind stops the living
        assert len(twin.check()) == before + 1
        twin.discard()
        if process.exitcode == 0:
            assert before == arena.num_commits + 1
            return deaths
        assert process.exitcode == -9
    raise AssertionError("it never came through")


def run_with(fuse, work, watch, actor) -> None:
    watch(fuse, actor.store)
    actor.before_note = lambda event: fuse.point(f"note {event}")
    work(actor)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the points come in the same order each time."""
    monkeypatch.setattr(store_module, "_THREADS", 1)


def watch_disk(fuse, store: FeatureStore) -> None:
    fuse.watch_disk(store.url)


def watch_s3_writes(fuse, store: FeatureStore) -> None:
    fuse.watch_s3({"put_object", "delete_object", "delete_objects", "copy_object"})


def watch_s3(fuse, store: FeatureStore) -> None:
    fuse.watch_s3()


@pytest.mark.parametrize("work", [put, delete, extract])
def test_on_disk(make_arena, make_fuse, trace, work) -> None:
    arena = make_arena()
    prepared(arena)
    deaths = die_everywhere(arena, work, make_fuse, watch_disk)
    points = Counter(trace())
    assert points.total() == deaths
    assert points["open log temporary"] == points["os.link log temporary"] == points["os.remove log temporary"] == 1
    assert points["os.rename data temporary"] >= 2
    assert points["write half"] >= 3
    assert points["fsync"] >= 2 * points["write half"]  # the file, and then its folder
    assert points["note done"] == 1  # all is done, and nobody was told


@pytest.mark.parametrize(
    "watch", [watch_s3_writes, pytest.param(watch_s3, marks=pytest.mark.slow)], ids=["writes", "every request"]
)
def test_on_s3(s3_url: str, make_arena, make_fuse, trace, watch) -> None:
    arena = make_arena(f"{s3_url}/store", num_shards=1 if watch is watch_s3_writes else 2)
    prepared(arena)
    deaths = die_everywhere(arena, put, make_fuse, watch)
    points = Counter(trace())
    assert points.total() == deaths
    assert points["before put_object"] == points["after put_object"] >= 2
