"""Kills of writers, compaction and expiry of one store, one every moment, while a reader looks on all the time."""

import random
import time

import pytest


def write(actor) -> None:
    while True:
        uris = [*actor.some_uris("hot", 6), *actor.some_uris("warm", 30)]
        actor.chance.choice([actor.put, actor.put, actor.extract, actor.delete])(uris)


def read(actor) -> None:
    while True:
        actor.read()
        time.sleep(0.01)


def compact(actor) -> None:
    while True:
        actor.compact()
        time.sleep(0.05)


def expire(actor) -> None:
    while True:
        actor.expire(keep_last=3, grace_s=5)
        time.sleep(0.05)


CREW = {"w0": write, "w1": write, "w2": write, "compactor": compact, "expirer": expire}


def kill_at_random(arena, seed: int, num_kills: int, pause_s: float, min_deleted: int) -> None:
    """Kill each of the crew in turn, in a random order, at random moments; each time after a new commit."""
    chance = random.Random(seed)
    victims = [role for _ in range(0, num_kills, len(CREW)) for role in chance.sample(list(CREW), len(CREW))]
    reader = arena.start("reader", read)
    alive = {role: arena.start(f"{role}-0", work) for role, work in CREW.items()}
    before = 0
    for number, role in enumerate(victims[:num_kills], 1):
        while arena.store.snapshot().version == before:  # on a busy machine too, work goes on between two kills
            assert all(process.is_alive() for process in alive.values()), arena.failures()
            time.sleep(0.01)
        time.sleep(chance.uniform(0, pause_s))
        assert alive[role].is_alive(), arena.failures()
        arena.kill(alive[role])
        before = len(arena.check())
        alive[role] = arena.start(f"{role}-{number}", CREW[role])
    assert reader.is_alive(), arena.failures()
    arena.close()
    manifests = arena.check()
    done = [m.operation.split()[0] for m in manifests]
    assert done.count("put") >= num_kills // 3
    assert done.count("compact") >= num_kills // 15
    assert sum(note["num_files"] for note in arena.notes() if note["event"] == "expired") >= min_deleted


def test_a_kill_of_each_on_disk(make_arena) -> None:
    kill_at_random(make_arena(), 0, len(CREW), 0.1, 0)


def test_a_kill_of_each_on_s3(s3_url: str, make_arena) -> None:
    kill_at_random(make_arena(f"{s3_url}/store"), 0, len(CREW), 0.25, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_kills_on_disk(make_arena, seed: int) -> None:
    kill_at_random(make_arena(), seed, 50, 0.2, 10)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_kills_on_s3(s3_url: str, make_arena, seed: int) -> None:
    kill_at_random(make_arena(f"{s3_url}/store"), seed, 50, 1.0, 10)
