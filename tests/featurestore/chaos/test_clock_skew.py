"""Writers whose clocks are wrong by days: order, opening by time and expiry stay right."""

import time
from datetime import UTC, datetime
from functools import partial

import pytest

from featurestore import log
from featurestore.storage.storage import Storage
from featurestore.upkeep.expiry import expire

DAY_S = 86400.0


def with_clock(offset_s: float, work, actor) -> None:
    """`work` in a process whose clock is wrong."""
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + offset_s
    time.time_ns = lambda: real_ns() + int(offset_s * 1e9)
    work(actor)


def run(arena, name: str, offset_s: float, work) -> None:
    process = arena.start(name, partial(with_clock, offset_s, work))
    process.join()
    assert process.exitcode == 0, arena.failures()


def put_some(actor) -> None:
    for step in range(5):
        actor.put([*actor.some_uris("hot", 4), f"{actor.name}-{step}"])


def expire_now(actor) -> None:
    expire(actor.store, keep_last=1, keep_days=30, grace_days=7)


def test_order_and_time_of_writers_with_wrong_clocks(make_arena, contents_of, replay) -> None:
    arena = make_arena()
    writers = [
        arena.start(f"w{i}", partial(with_clock, offset_s, put_some))
        for i, offset_s in enumerate([0.0, -400 * DAY_S, 3600.0, -1.0])
    ]
    for writer in writers:
        writer.join()
    manifests = arena.check()  # each on its parent, and time never backwards
    assert len(manifests) == 20
    states = replay(manifests)
    times = [m.time_s for m in manifests]
    for manifest in manifests:
        later = [t for t in times if t > manifest.time_s]
        last = len(times) - len(later)  # the newest of those with the same time
        moment = datetime.fromtimestamp(manifest.time_s + 1e-6, UTC)
        found = arena.store.snapshot(at=moment)
        assert found.version == last or times[found.version] - manifest.time_s < 2e-6
        assert contents_of(found) == states[found.version]


@pytest.mark.parametrize("offset_s", [-400 * DAY_S, 400 * DAY_S], ids=["a year behind", "a year ahead"])
def test_expiry_deletes_nothing_early_whoever_has_the_wrong_clock(make_arena, contents_of, offset_s: float) -> None:
    for wrong in ("writer", "expirer"):
        arena = make_arena()
        run(arena, "writer", offset_s if wrong == "writer" else 0.0, put_some)
        held = [arena.store.snapshot(version) for version in log.versions(arena.store.storage)]
        before = [contents_of(snapshot) for snapshot in held]
        orphan = arena.store.storage.join("data", "0000", "orphan.parquet")
        arena.store.storage.write_bytes(orphan, b"of a writer at work")
        run(arena, "expirer", offset_s if wrong == "expirer" else 0.0, expire_now)
        assert log.versions(arena.store.storage) == [snapshot.version for snapshot in held], "younger than 30 days"
        assert [contents_of(snapshot) for snapshot in held] == before
        assert arena.store.storage.size(orphan)
        arena.check()


def test_the_storage_tells_the_time_of_its_files(make_arena) -> None:
    """Ages are differences of two times of the storage, so that no clock of a client is asked."""
    storage: Storage = make_arena().store.storage
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: 0.0)
        storage.write_bytes("probe", b"x")
        assert abs(storage.now() - storage.entry("probe").mtime_s) < 5
