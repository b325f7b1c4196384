"""Expiry cut off before each of its writes, and others at work before each: nothing that is needed goes."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from featurestore import FeatureStore, StoreInfo, log
from featurestore.errors import SnapshotNotFoundError
from featurestore.snapshot import Snapshot
from featurestore.storage.local import DiskFiles
from featurestore.storage.storage import Storage
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import ExpireReport, expire
from featurestore.upkeep.history import Pin, pin, restore
from tests.featurestore.staged import build_shard

DAY_S = 86_400.0


def age(store: FeatureStore, days: float) -> None:
    """Let time pass: every file is so much older."""
    for path in Path(store.url).rglob("*"):
        if path.is_file():
            stat = path.stat()
            os.utime(path, (stat.st_atime, stat.st_mtime - days * DAY_S))


def files_of(store: FeatureStore) -> set[str]:
    return {entry.path for entry in store.storage.entries()}


def needs(snapshot: Snapshot) -> set[str]:
    entries = [entry for files in snapshot.manifest.shards.values() for entry in files]
    return {path for entry in entries for path in (entry.path, entry.statistics_path) if path}


def expire_to(store: FeatureStore, keep_last: int) -> ExpireReport:
    return expire(store, keep_last=keep_last, keep_days=0, grace_days=7)


class Killed(BaseException):
    """As if the process had died."""


@contextmanager
def at_write(number: int, work: Callable[[], object]) -> Iterator[list[int]]:
    """Does `work` before write number `number` of what runs inside; gives the count of writes and deletes."""
    count = [0]
    originals = {name: getattr(DiskFiles, name) for name in ("create_exclusive", "open_output", "delete")}

    def step() -> None:
        count[0] += 1
        if count[0] == number:
            work()

    def delete_files(self: DiskFiles, paths: Any) -> None:
        for path in paths:
            step()
            self.path(path).unlink(missing_ok=True)

    @contextmanager
    def open_output(self: DiskFiles, path: str) -> Iterator[IO[bytes]]:
        with originals["open_output"](self, path) as file:
            yield file
            step()  # before it gets its name

    with pytest.MonkeyPatch.context() as patch:
        for name in ("create_exclusive", "delete"):
            patch.setattr(DiskFiles, name, lambda *arguments, original=originals[name]: step() or original(*arguments))
        patch.setattr(DiskFiles, "open_output", open_output)
        patch.setattr(DiskFiles, "delete_files", delete_files)
        yield count


class TestCutOffOrDisturbedAnywhere:
    """Expired before: 1, 2. Now 3 to 5 leave and 6, 7 stay; files of 1 and 2 alone, and those of dead writers, go."""

    @pytest.fixture
    def template(self, tmp_path: Path, info: StoreInfo, make_rows) -> FeatureStore:
        store = FeatureStore.create(tmp_path / "template", info.model_copy(update={"num_shards": 2}))
        store.put(make_rows(12, store.info, seed=1))
        store.put(make_rows(4, store.info, seed=2))
        compact(store, force=True)
        expire_to(store, 1)
        store.stage_part("dead", "p", make_rows(3, store.info))
        build_shard(store, "dead", 0, ["p"])
        store.storage.write_bytes("data/0000/.tmp-1", b"x")
        store.put(make_rows(4, store.info, seed=4))
        age(store, 8)
        store.put(make_rows(4, store.info, seed=5))
        compact(store, force=True)
        store.put(make_rows(4, store.info, seed=7))
        return store

    @pytest.fixture
    def copies(self, template: FeatureStore, tmp_path: Path) -> Iterator[FeatureStore]:
        def fresh() -> Iterator[FeatureStore]:
            while True:
                folder = tmp_path / "copy"
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(template.url, folder)
                yield FeatureStore.open(folder)

        return fresh()

    @pytest.fixture
    def num_writes(self, copies: Iterator[FeatureStore]) -> int:
        with at_write(0, lambda: None) as count:
            report = expire_to(next(copies), 2)
        assert (report.expired, report.kept, report.runs) == ((3, 4, 5), (6, 7), ("dead",))
        assert report.num_files > 4 and count[0] > 16
        return count[0]

    def test_killed_anywhere_the_next_run_finishes_the_job(
        self, copies: Iterator[FeatureStore], num_writes: int
    ) -> None:
        calm = next(copies)
        expire_to(calm, 2)
        expected = files_of(calm)
        for number in range(1, num_writes + 1):
            store = next(copies)
            readers = [store.snapshot(version) for version in range(3, 8)]

            def die() -> None:
                raise Killed

            with pytest.raises(Killed), at_write(number, die):
                expire_to(store, 2)
            for snapshot in readers:
                assert needs(snapshot) <= files_of(store), f"write {number}: version {snapshot.version}"
            assert store.snapshot().version == 7
            expire_to(store, 2)
            # The clock's probe is too young to go.
            assert {path for path in files_of(store) if ".tmp-" not in path} == expected, f"write {number}"
            assert all(needs(snapshot) <= expected for snapshot in readers)

    @pytest.mark.parametrize("rival", ["put", "restore", "compact", "expire", "pin"])
    def test_others_may_do_anything_anywhere(
        self, copies: Iterator[FeatureStore], num_writes: int, make_rows, rival: str
    ) -> None:
        for number in range(1, num_writes + 1, 3):
            store = next(copies)
            readers = [store.snapshot(version) for version in range(3, 8)]
            work = {
                "put": lambda store=store: store.put(make_rows(9, store.info, seed=9)),
                "restore": lambda store=store: restore(store, 6),
                "compact": lambda store=store: compact(store, force=True),
                "expire": lambda store=store: expire_to(store, 1),
                "pin": lambda store=store: pin_if_possible(store, 4),
            }[rival]
            with at_write(number, work):
                expire_to(store, 2)
            for snapshot in [*readers, store.snapshot()]:
                assert needs(snapshot) <= files_of(store), f"write {number}: version {snapshot.version}"
            assert store.snapshot().version == (7 if rival in ("expire", "pin") else 8)
            for version in log.versions(store.storage):
                assert store.snapshot(version).num_rows == 12


def pin_if_possible(store: FeatureStore, version: int) -> None:
    """And if the pin is made, its snapshot must be there ever after: see the check of its files."""
    try:
        pin(store, "rival", version)
    except SnapshotNotFoundError:
        return
    assert version in log.versions(store.storage)


def test_a_copy_that_another_expiry_takes_away_is_made_again(
    store: FeatureStore, make_rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that saw a pin, which has been withdrawn since, because it saw the copy."""
    reader = store.put(make_rows(9, store.info, seed=1))
    store.put(make_rows(9, store.info, seed=2))
    compact(store, force=True)
    age(store, 8)

    def without_pins(storage: Storage) -> list[Pin]:
        storage.delete(log.manifest_path(1, log.EXPIRED))
        return []

    monkeypatch.setattr("featurestore.upkeep.history.read_pins", without_pins)
    expire_to(store, 1)
    assert log.versions(store.storage, log.EXPIRED) == [1, 2]
    assert needs(reader) <= files_of(store)
