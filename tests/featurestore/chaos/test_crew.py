"""Many processes work on one store at once, killed or not: their history holds together, and its checker can fail."""

import random
import time
from functools import partial

import pytest

from featurestore.commit import Commit
from tests.faulty import faulty, preceded_by
from tests.featurestore.chaos.conftest import manifests_of
from tests.featurestore.staged import build_shard

MAX_S = 400


def write(actor, count: int | None = None, barrier=None) -> None:
    """Same keys, keys of its own, new keys; delete against put; without an end unless there is a `count`."""
    if barrier is not None:
        barrier.wait()
    step = 0
    while step != count:
        uris = [
            actor.some_uris("hot", 4),
            [*actor.some_uris("warm", 30), *actor.some_uris("hot", 4)],
            actor.some_uris(f"{actor.name}-", 8),
            [f"new-{actor.name}-{step}"],
        ][step % 4]
        actor.chance.choice([actor.put, actor.put, actor.extract, actor.delete])(uris)
        step += 1


def read(actor) -> None:
    while True:
        actor.read()
        time.sleep(0.02)


def compact(actor) -> None:
    while True:
        actor.compact()
        time.sleep(0.05)


def expire(actor) -> None:
    while True:
        actor.expire(keep_last=3)
        time.sleep(0.05)


CREW = {"w0": write, "w1": write, "w2": write, "compactor": compact, "expirer": expire}


@pytest.mark.parametrize("num_commits", [24, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_many_commits_of_eight_writers(make_arena, num_commits: int) -> None:
    arena = make_arena()
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
    operations = [manifest.operation.split()[0] for manifest in arena.check()]
    assert operations.count("put") + operations.count("delete") == num_commits // 8 * 8
    assert operations.count("delete") > num_commits // 8
    assert operations.count("compact") > num_commits // 100


MANY = [pytest.param("disk", seed, 50, 0.2, 10, marks=pytest.mark.slow) for seed in range(1, 11)]
MANY += [pytest.param("s3", seed, 50, 1.0, 10, marks=pytest.mark.slow) for seed in range(1, 11)]


@pytest.mark.parametrize(
    ("place", "seed", "num_kills", "pause_s", "min_deleted"), [("disk", 0, len(CREW), 0.1, 0), *MANY]
)
def test_kills_of_each_at_random_moments(
    make_arena, request: pytest.FixtureRequest, place: str, seed: int, num_kills: int, pause_s: float, min_deleted: int
) -> None:
    """One after the other, in a random order, each after a new commit; a reader looks on all the time."""
    arena = make_arena(f"{request.getfixturevalue('s3_url')}/store" if place == "s3" else None)
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
    done = [manifest.operation.split()[0] for manifest in arena.check()]
    assert done.count("put") >= num_kills // 3
    assert done.count("compact") >= num_kills // 15
    assert sum(note["num_files"] for note in arena.notes() if note["event"] == "expired") >= min_deleted


URIS = [f"u{i}" for i in range(8)]


def interrupt(actor, meanwhile) -> None:
    """Let something happen just before the actor creates its next manifest."""
    actor.store = faulty(actor.store, create_exclusive=preceded_by(meanwhile))


@pytest.fixture
def arena(make_arena):
    made = make_arena()
    made.actor("before").put(URIS)
    made.check()
    return made


def test_it_passes_a_store_that_is_sound(arena) -> None:
    slow, quick = arena.actor("slow"), arena.actor("quick")
    interrupt(slow, lambda: quick.put(["b"]))
    slow.put(["a"])
    interrupt(slow, lambda: quick.put(["c"]))
    slow.compact(force=True)
    assert len(arena.check()) == 5


def test_a_create_that_overwrites(arena) -> None:
    slow, quick = arena.actor("slow"), arena.actor("quick")

    def overwriting(create: object, path: str, data: bytes) -> bool:
        arena.store.storage.write_bytes(path, data)
        return True

    slow.store = faulty(slow.store, create_exclusive=overwriting)
    interrupt(slow, lambda: quick.put(["b"]))
    slow.put(["a"])
    with pytest.raises(AssertionError, match="was acknowledged to put quick"):
        arena.check()


def test_a_compaction_that_forgets_what_came_meanwhile(arena, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, quick = arena.actor("slow"), arena.actor("quick")
    quick.put(URIS[:4])
    onto = Commit.onto
    monkeypatch.setattr(Commit, "onto", lambda self, parent: onto(self, parent) | (self.replaces and self.entries))
    interrupt(slow, lambda: quick.put(URIS))
    slow.compact(force=True)
    with pytest.raises(AssertionError, match="is not the log's replay"):
        arena.check()


def test_a_half_state(arena, rows_of) -> None:
    """A commit of two shards of which one is lost."""
    actor = arena.actor("half")
    actor.note("begin", operation="put half u0 u1 u2 u3")
    run = "half"
    arena.store.stage_part(run, "0", rows_of("half", URIS[:4]))
    entry = build_shard(arena.store, run, 0, ["0"])
    arena.store.commit({0: entry}, "put half u0 u1 u2 u3")
    with pytest.raises(AssertionError, match="is not the log's replay"):
        arena.check()
