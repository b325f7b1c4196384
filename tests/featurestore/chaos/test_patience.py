"""Readers that hold a snapshot for long, and writers that pause for long, while others compact and expire."""

import contextlib
import os
import time
from collections.abc import Iterator

import pytest

from featurestore import FeaturePartition, key_of_uri
from featurestore.errors import CorruptFileError, FeatureStoreError
from featurestore.storage.storage import Storage
from tests.faulty import faulty, preceded_by

DAY_S = 86400.0
URIS = [f"u{i}" for i in range(8)]


@contextlib.contextmanager
def days_later(days: float) -> Iterator[None]:
    """As if all that is in a store were older by that."""
    now = Storage.now
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "now", lambda self: now(self) + days * DAY_S)
        yield


def much_happens(arena, name: str, days: float = 0.0) -> None:
    """Others write, compact and expire, so that nothing of the store of before is needed by the newest snapshots."""
    actor = arena.actor(name)
    for number in range(4):
        actor.put([*URIS, f"{name}-{number}"])
    actor.delete(URIS[:2])
    actor.compact(force=True)
    actor.put([f"{name}-last"])
    with days_later(days):
        actor.expire(keep_last=1, grace_s=7 * DAY_S)
        actor.expire(keep_last=1, grace_s=7 * DAY_S)


def begin(arena) -> None:
    actor = arena.actor("before")
    actor.put(URIS)
    actor.put([*URIS[:4], "v"])
    actor.delete(URIS[3:5])
    if arena.store.storage.is_local:  # a snapshot of last month: its files are older than any grace
        month_ago_s = time.time() - 30 * DAY_S
        for entry in arena.store.storage.entries():
            os.utime(f"{arena.store.url}/{entry.path}", (month_ago_s, month_ago_s))


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.slow)])
def arena(request: pytest.FixtureRequest, make_arena):
    made = make_arena(f"{request.getfixturevalue('s3_url')}/store" if request.param == "s3" else None)
    begin(made)
    return made


def test_a_held_snapshot_is_read_as_if_nothing_had_happened(arena, contents_of, tmp_path) -> None:
    held, untouched = arena.store.snapshot(), arena.store.snapshot()
    contents = contents_of(held)
    much_happens(arena, "others", days=6)
    assert contents_of(held) == contents_of(untouched) == contents
    assert untouched.get([key_of_uri("u0")]).tolist() == held.get([key_of_uri("u0")]).tolist()
    assert untouched.num_rows == len(contents)
    arena.check()


def test_a_snapshot_held_beyond_the_grace_is_an_error_and_never_other_rows(arena, contents_of) -> None:
    held = arena.store.snapshot()
    much_happens(arena, "others", days=8)
    with pytest.raises(CorruptFileError, match="missing"):
        contents_of(held)
    arena.check()


def test_a_partition_serves_on_when_its_snapshot_is_gone(make_arena, tmp_path) -> None:
    arena = make_arena()
    begin(arena)
    with FeaturePartition.load(arena.store, cache_dir=tmp_path / "cache") as partition:
        before = partition.lookup([key_of_uri("u0"), key_of_uri("v")]).features_UD.tolist()
        much_happens(arena, "others", days=400)
        assert partition.lookup([key_of_uri("u0"), key_of_uri("v")]).features_UD.tolist() == before


PAUSES = ["build", "commit", "manifest"]


def write_with_pause(arena, pause: str, meanwhile) -> None:
    """One commit of staged rows; `meanwhile` happens before files are built, before the commit or its last step."""
    actor = arena.actor("slow")
    if pause == "manifest":
        actor.store = faulty(actor.store, create_exclusive=preceded_by(meanwhile))
    actor.extract([*URIS, "slow-0", "slow-1"], lambda step: meanwhile() if step == pause else None)


@pytest.mark.parametrize("pause", PAUSES)
def test_a_writer_that_pauses_less_than_the_grace_commits(arena, pause: str) -> None:
    write_with_pause(arena, pause, lambda: much_happens(arena, "others", days=6))
    manifests = arena.check()
    assert manifests[-1].operation.startswith("put slow")


@pytest.mark.parametrize("pause", PAUSES)
def test_a_writer_that_pauses_longer_commits_or_says_why_not_and_breaks_nothing(arena, pause: str) -> None:
    with contextlib.suppress(FeatureStoreError):
        write_with_pause(arena, pause, lambda: much_happens(arena, "others", days=8))
    arena.check()
    arena.actor("after").put(["x"])
    arena.check()
