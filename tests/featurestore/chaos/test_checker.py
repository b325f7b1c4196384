"""The checker of histories finds what it is there for: stores broken on purpose do not pass it."""

import pytest

from featurestore.commit import Commit
from tests.faulty import faulty, preceded_by
from tests.featurestore.staged import build_shard

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
