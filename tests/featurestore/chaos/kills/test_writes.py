"""What is done to a store dies before, within or after a write: no wrong row is seen, and the next run completes it.

Here the calls of a storage die. In test_machine.py processes die in the middle of what they write, and in
tests/simulated those that put, delete, compact, restore, expire and purge beside others.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featurestore import FeatureStore, QuarantineRow, StoreInfo, key_of_uri
from featurestore.log import EXPIRED, manifest_path, versions
from featurestore.storage.storage import Storage
from featurestore.upkeep.expiry import expire
from featurestore.upkeep.history import move_channel
from featurestore.upkeep.purge import find_traces, purge
from featurestore.upkeep.remake import RemakeReport, remake
from featurestore.upkeep.verify import repair, verify
from tests.featurestore.conftest import fill, make_rows, put
from tests.featurestore.contents import (
    GONE,
    IMAGES,
    SHARD,
    contents,
    days_later,
    everything,
    leave_in_expired,
    spoil,
    without,
)

pytestmark = pytest.mark.long


class Killed(BaseException):
    """What kill -9 is to a process: nothing in between catches it."""


@contextmanager
def dying(at: int, after: bool = False) -> Iterator[list[str]]:
    """Let all storages die at a write, before it or right after it; of files deleted together half are gone then.

    Gives the writes that were begun. At 0 nothing happens.
    """
    begun: list[str] = []

    def dies(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def method(storage: Storage, where: Any, *rest: Any) -> Any:
            paths = [where] if isinstance(where, str) else list(where)
            begun.append(f"{name} {min(paths, default='')}")
            if 0 < at <= len(begun):
                is_now = len(begun) == at
                if is_now and name == "delete_files":
                    call(storage, paths[: len(paths) // 2])
                elif is_now and after and name != "open_output":
                    call(storage, where, *rest)
                raise Killed
            return call(storage, where if isinstance(where, str) else paths, *rest)

        return method

    names = ("write_bytes", "create_exclusive", "create_or_read", "delete", "delete_files", "open_output")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featurestore.upkeep.remake.refuse_unsafe", lambda storage: None)  # tried elsewhere
        for name in names:
            patch.setattr(Storage, name, dies(name, getattr(Storage, name)))
        yield begun


@dataclass(frozen=True)
class Work:
    """What is done to a store, and what has to hold: right after a death, and after the next run."""

    prepare: Callable[[FeatureStore], object]
    work: Callable[[FeatureStore], object]
    check_dead: Callable[..., object]  # the dead one, one that nobody has touched, and one that nobody has disturbed
    check_done: Callable[[FeatureStore, FeatureStore], object]  # the first and the last of them


@cache
def kept(store: FeatureStore, which: int | str | None = None) -> dict[str, bytes]:
    """Read the contents of a store that nobody changes any more: once for all deaths."""
    return contents(store, which)


NEWER = ["images/1.jpg", "images/4.jpg", "more.jpg"]
"""Some of them are in the store, or were."""


def extract_them(store: FeatureStore) -> None:
    rows = make_rows(NEWER, store.info, seed=9)
    for part in range(2):
        store.stage_part("run", f"{part}", rows.take(np.arange(part, 3, 2)))
    built = store.build_shards("run", range(store.info.num_shards), ["0", "1"])
    store.commit(built, "extract")
    store.discard_staging("run")


def all_or_nothing(dead: FeatureStore, before: FeatureStore, calm: FeatureStore) -> None:
    """The commit is there with all of its rows, or it is not; other snapshots are as they were."""
    assert contents(dead) == kept(calm if dead.snapshot().version > before.snapshot().version else before)
    for version in versions(before.storage):
        assert contents(dead, version) == kept(before, version)


def same_rows(done: FeatureStore, calm: FeatureStore) -> None:
    assert contents(done) == kept(calm) and verify(done).problems == []
    with days_later(8):
        expire(done, keep_last=1, keep_days=0)
        expire(done, keep_last=1, keep_days=0)
    named = {entry.path for entry in done.snapshot().manifest.entries}
    left = {entry.path for entry in done.storage.entries() if entry.path.endswith(".parquet")}
    assert left == named, "what the dead one left stays"


def with_images_to_take_down(store: FeatureStore) -> None:
    put(store, 10, first=100)
    put(store, 40)
    put(store, 5, seed=5, first=30)
    store.add_quarantine([QuarantineRow(key_of_uri(GONE[1]), GONE[1], "truncated", 1.0)])
    store.stage_part("refresh", "part-1", make_rows(20, store.info, seed=9))
    move_channel(store, "stable", 3)


def take_down(store: FeatureStore, **options: Any) -> None:
    assert purge(store, IMAGES, **options).is_complete


def all_or_none_are_gone(dead: FeatureStore, before: FeatureStore, calm: FeatureStore) -> None:
    for which in (None, "stable"):
        assert contents(dead, which) in (kept(before), without(kept(before)))


def none_is_left(done: FeatureStore, calm: FeatureStore) -> None:
    assert contents(done) == kept(calm) == contents(done, "stable")
    assert find_traces(done.storage, IMAGES).is_absent
    assert {problem.kind for problem in verify(done).problems} <= {"pin"}


def with_young_images_to_take_down(store: FeatureStore) -> None:
    """The files that only manifests name which the dead purge took out of the log are young, and yet they go."""
    put(store, 20)
    put(store, 20, seed=1)
    move_channel(store, "stable", 2)


def with_damage(store: FeatureStore) -> None:
    """The newest manifest, and the delta of a shard in the one before it."""
    fill(store)
    delta = store.snapshot(2).manifest.files(SHARD)[1]
    spoil(store, manifest_path(3))
    spoil(store, delta.path)


def with_expired_manifests(store: FeatureStore) -> None:
    """The newest manifest is damaged, and an expiry has put those before it aside."""
    for seed in range(3):
        put(store, 60, seed=seed)
    leave_in_expired(store, [3], [1, 2])


def anything(dead: FeatureStore, before: FeatureStore, calm: FeatureStore) -> None:
    """A store that cannot be read before can be read or not."""


def mended(done: FeatureStore, calm: FeatureStore) -> None:
    assert everything(done) == everything(calm) and verify(done).problems == []
    assert {row.key for row in done.quarantine_rows()} == {row.key for row in calm.quarantine_rows()}
    assert versions(done.storage) == versions(calm.storage)
    assert set(versions(done.storage, EXPIRED)) <= set(versions(done.storage)), "only copies of what is in the log"


with_rows = partial(fill, count=60, newer=20, gone=5)


def new_one(store: FeatureStore) -> str:
    return f"{store.url}-new"


def make_anew(store: FeatureStore, **options: Any) -> RemakeReport:
    return remake(store, new_one(store), **options)


def nothing_is_committed(dead: FeatureStore, before: FeatureStore, calm: FeatureStore) -> None:
    assert Storage(new_one(dead)).list("log") in ([], [f"{1:020d}.json"])
    assert contents(dead) == kept(before)


def same_new_store(done: FeatureStore, calm: FeatureStore) -> None:
    mine, theirs = (FeatureStore.open(new_one(each)) for each in (done, calm))
    assert contents(mine) == contents(theirs) and mine.info.reduction == theirs.info.reduction
    assert mine.snapshot().version == 1 and verify(mine).problems == []


WORKS = {
    "extract": Work(with_rows, extract_them, all_or_nothing, same_rows),
    "purge": Work(with_images_to_take_down, partial(take_down, writer_hours=0), all_or_none_are_gone, none_is_left),
    "purge of young files": Work(with_young_images_to_take_down, take_down, all_or_none_are_gone, none_is_left),
    "repair": Work(with_damage, repair, anything, mended),
    "repair of the log": Work(with_expired_manifests, repair, anything, mended),
    "remake": Work(with_rows, partial(make_anew, dtype="float16"), nothing_is_committed, same_new_store),
    "remake of fewer numbers": Work(
        with_rows, partial(make_anew, dims=4, threads=1), nothing_is_committed, same_new_store
    ),
}
EVERY = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "every"])


@EVERY
@pytest.mark.parametrize("work", [pytest.param(each, marks=[pytest.mark.slow] * ("purge" in each)) for each in WORKS])
def test_on_a_disk(work: str, every: bool, tmp_path: Path, info: StoreInfo) -> None:
    """Before the first and the last write of each kind and some of the others, or before each, and after the last."""
    url = tmp_path / "before"
    before = FeatureStore.create(url, info.model_copy(update={"num_shards": 4}))
    WORKS[work].prepare(before)

    def copied(name: str) -> FeatureStore:
        return FeatureStore.open(shutil.copytree(url, tmp_path / name))

    calm = copied("calm")
    with dying(0) as whole:
        WORKS[work].work(calm)
    for at in range(1, len(whole) + 1) if every else sorted({*range(1, len(whole) + 1, 5), *ends_of_kinds(whole)}):
        check_death(WORKS[work], copied(f"{at}"), before, calm, at, False)
    check_death(WORKS[work], copied("last"), before, calm, len(whole), True)


def ends_of_kinds(begun: list[str]) -> set[int]:
    """Count to the first and the last write of each kind: its name, and the folder that it is in."""
    kinds = [re.split("[/-]", each)[0] for each in begun]
    return {kinds.index(kind) + 1 for kind in kinds} | {len(kinds) - kinds[::-1].index(kind) for kind in kinds}


def check_death(
    work: Work, store: FeatureStore, before: FeatureStore, calm: FeatureStore, at: int, after: bool
) -> None:
    with dying(at, after) as begun, pytest.raises(Killed):
        work.work(store)
    work.check_dead(store, before, calm)
    work.work(store)
    try:
        work.check_done(store, calm)
    except AssertionError as error:
        error.add_note(f"killed at write {at} of {begun}")
        raise


def test_a_remake_is_of_the_newest_snapshot_when_it_starts_again(tmp_path: Path, info: StoreInfo) -> None:
    source = FeatureStore.create(tmp_path / "source", info)
    with_rows(source)
    with dying(4), pytest.raises(Killed):
        make_anew(source, dtype="float16", threads=1)
    source.put(make_rows(9, info, first=500))
    assert make_anew(source, dtype="float16").num_rows == source.snapshot().num_rows == 64
    data = Path(new_one(source), "data")
    left = {*data.rglob("*.parquet")}
    with days_later(8):
        expire(FeatureStore.open(new_one(source)))
    kept = {*data.rglob("*.parquet")}
    assert len(kept) == 8 and kept < left, "what the dead one wrote goes in time"
