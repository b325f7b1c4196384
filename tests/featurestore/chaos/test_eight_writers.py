"""Eight processes write the same store at once: their history holds together to the last row."""

import time
from functools import partial

import pytest

from tests.featurestore.chaos.conftest import manifests_of

MAX_S = 400


def write(actor, count: int, barrier) -> None:
    """Same keys, keys of its own, new keys; delete against put."""
    barrier.wait()
    for step in range(count):
        uris = [
            actor.some_uris("hot", 4),
            actor.some_uris("warm", 30),
            actor.some_uris(f"{actor.name}-", 8),
            [f"new-{actor.name}-{step}"],
        ][step % 4]
        actor.chance.choice([actor.put, actor.put, actor.delete])(uris)


def read(actor) -> None:
    while True:
        actor.read()
        time.sleep(0.2)


def compact(actor) -> None:
    while True:
        actor.compact()
        time.sleep(0.2)


def expire(actor) -> None:
    while True:
        actor.expire(keep_last=20, grace_s=30)
        time.sleep(0.5)


def run_writers(arena, num_commits: int) -> None:
    barrier = arena.context.Barrier(8)
    others = [arena.start(work.__name__, work) for work in (read, compact, expire)]
    write_some = partial(write, count=num_commits // 8, barrier=barrier)
    writers = [arena.start(f"w{i}", write_some) for i in range(8)]
    for writer in writers:
        writer.join(MAX_S)
        assert writer.exitcode == 0, arena.failures()
    while not any(each.operation.startswith("compact") for each in manifests_of(arena.store, ())):
        time.sleep(0.1)  # the test's own limit ends it
    for process in others:
        assert process.is_alive(), arena.failures()
        arena.kill(process)
    manifests = arena.check()
    operations = [m.operation.split()[0] for m in manifests]
    assert operations.count("put") + operations.count("delete") == num_commits // 8 * 8
    assert operations.count("delete") > num_commits // 6
    assert operations.count("compact") > num_commits // 100


@pytest.mark.parametrize("num_commits", [64, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_many_commits_of_eight_writers(make_arena, num_commits: int) -> None:
    run_writers(make_arena(), num_commits)
