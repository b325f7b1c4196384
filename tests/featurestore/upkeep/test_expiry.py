"""Expiry takes what nobody needs, and never what a kept snapshot, a reader or a writer needs, cut off or not."""

import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from featurestore import FeatureStore, StoreInfo, log
from featurestore.errors import CorruptFileError, SnapshotNotFoundError
from featurestore.problems import Problem
from featurestore.spec import ReductionSpec
from featurestore.storage.storage import Storage
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import ExpireReport, expire, kept_versions
from featurestore.upkeep.history import Pin, move_channel, pin
from featurestore.upkeep.verify import repair
from tests.featurestore.conftest import make_rows, put
from tests.featurestore.contents import needs, paths_in, run, spoil
from tests.raised import raises, told

pytestmark = pytest.mark.long

DAY_S = 86_400.0


def age(store: FeatureStore, days: float) -> None:
    """Let time pass: every file is so much older."""
    for path in Path(store.url).rglob("*"):
        if path.is_file():
            stat = path.stat()
            os.utime(path, (stat.st_atime, stat.st_mtime - days * DAY_S))


def expire_to(store: FeatureStore, keep_last: int, grace_days: float = 7.0, **options: Any) -> ExpireReport:
    return expire(store, keep_last=keep_last, keep_days=0, grace_days=grace_days, **options)


@pytest.fixture
def merged(filled_by) -> FeatureStore:
    """1: put, 2: put, 3: compaction, which needs none of the files before it, 4: put."""

    def four_commits(store: FeatureStore) -> None:
        put(store, 40, seed=1)
        put(store, 20, seed=2)
        compact(store, force=True)
        put(store, 5, seed=3)

    return filled_by(four_commits)


class TestPolicy:
    MADE_S = ((1, 0.0), (2, 10.0), (5, 20.0), (6, 30.0))

    @pytest.mark.parametrize(
        ("now_s", "keep_last", "keep_s", "pinned", "kept"),
        [
            (30, 1, 0, (), {6}),
            (30, 0, 0, (), {6}),
            (30, 3, 0, (), {2, 5, 6}),
            (30, 9, 0, (), {1, 2, 5, 6}),
            (35, 1, 6, (), {5, 6}),  # 5 was the newest until 5 seconds ago
            (35, 1, 5, (), {6}),
            (35, 1, 20, (), {2, 5, 6}),
            (35, 1, 0, (1,), {1, 6}),
            (1e9, 1, 0, (2, 5), {2, 5, 6}),
        ],
    )
    def test_what_is_kept(self, now_s: float, keep_last: int, keep_s: float, pinned: tuple, kept: set) -> None:
        assert kept_versions(self.MADE_S, now_s, keep_last, keep_s, pinned) == kept
        assert kept_versions([], now_s, keep_last, keep_s, ()) == set()

    def test_the_defaults_keep_ten_and_thirty_days(self, store: FeatureStore) -> None:
        for version in range(14):
            put(store, 1, seed=version)
        assert expire(store).expired == ()
        age(store, 31)
        report = expire(store)
        assert (report.expired, report.kept) == ((1, 2, 3, 4), tuple(range(5, 15)))

    @pytest.mark.parametrize("option", ["keep_last", "keep_days", "grace_days"])
    @pytest.mark.parametrize("value", [-1, float("nan")])
    def test_numbers_below_0_are_refused(self, store: FeatureStore, option: str, value: float) -> None:
        with pytest.raises(ValueError, match=told(Problem.NEGATIVE, where=option, value=value)):
            expire(store, **{option: value})


class TestSteps:
    def test_first_the_snapshots_then_their_files(self, merged: FeatureStore) -> None:
        age(merged, 100)
        needed = needs(merged.snapshot(4)) | needs(merged.snapshot(3))
        going = (needs(merged.snapshot(1)) | needs(merged.snapshot(2))) - needed
        report = expire_to(merged, 2)
        assert (report.kept, report.expired, report.num_files) == ((3, 4), (1, 2), 0)
        assert report.num_waiting == len(going) > 0 and report.num_waiting_bytes > 0
        with raises(SnapshotNotFoundError, Problem.EXPIRED, where=merged.url, value=2):
            merged.snapshot(2)
        age(merged, 6.9)
        assert expire_to(merged, 2).num_files == 0
        assert paths_in(merged, "data") == needed | going
        age(merged, 0.2)
        report = expire_to(merged, 2)
        assert (report.num_files, report.num_waiting, report.is_complete) == (len(going), 0, True)
        assert paths_in(merged, "data") == needed
        assert paths_in(merged, "expired") == set()
        assert merged.snapshot().num_rows == 40

    def test_what_a_pin_or_a_channel_names_stays_whole(self, merged: FeatureStore) -> None:
        pin(merged, "a", 1)
        move_channel(merged, "stable", 2)
        kept = needs(merged.snapshot(1)) | needs(merged.snapshot(2)) | needs(merged.snapshot(4))
        for _ in range(2):
            age(merged, 8)
            expire_to(merged, 1)
        assert log.versions(merged.storage) == [1, 2, 4]
        assert paths_in(merged, "data") == kept


class TestWhatDeadWritersLeft:
    def test_it_goes_after_the_grace_and_not_before(self, merged: FeatureStore) -> None:
        """What a run stages that goes on, and files of others, stay."""
        for path in ("quarantine/a.parquet", "damaged/b.json", "reports/c.json", "notes.txt"):
            merged.storage.write_bytes(path, b"x")
        merged.stage_part("running", "p-0", make_rows(3, merged.info))
        named = paths_in(merged)
        merged.stage_part("dead", "p", make_rows(30, merged.info, first=100))
        built = merged.build_shards("dead", range(8), ["p"])
        for folder in ("", "log/", "data/0003/", "staging/dead/", ".tmp-check/"):
            merged.storage.write_bytes(f"{folder}.tmp-{'0' * 32}", b"half")
        left = paths_in(merged) - named
        assert len(left) == 1 + len(built) + 5
        age(merged, 6.9)
        assert expire_to(merged, 10).num_files == 0
        merged.stage_part("running", "p-1", make_rows(3, merged.info, first=3))
        age(merged, 0.2)
        report = expire_to(merged, 10)
        assert (report.num_files, report.runs) == (len(left), ("dead",))
        assert paths_in(merged) - named == {"staging/running/p-1.parquet"} and named < paths_in(merged)

    def test_the_basis_of_the_store_stays(self, tmp_path: Path, info: StoreInfo) -> None:
        basis = ReductionSpec(path="basis/mine.safetensors", sha256="0" * 64, full_dim=info.dim + 1)
        other = FeatureStore.create(tmp_path / "compact", info.model_copy(update={"reduction": basis}))
        for name in ("mine", "orphan"):
            other.storage.write_bytes(f"basis/{name}.safetensors", b"x")
        age(other, 8)
        assert expire_to(other, 1).num_files == 1
        assert paths_in(other, "basis") == {"basis/mine.safetensors"}

    def test_data_without_a_log_is_not_touched(self, merged: FeatureStore) -> None:
        data = paths_in(merged, "data")
        shutil.rmtree(Path(merged.url) / "log")
        age(merged, 100)
        assert expire_to(merged, 1).num_files == 0
        assert paths_in(merged, "data") == data


class TestDamage:
    @pytest.mark.parametrize(
        "damaged",
        [
            [log.manifest_path(4)],
            [log.manifest_path(3)],
            [log.manifest_path(2)],
            [log.manifest_path(version) for version in (2, 3, 4)],
            [log.manifest_path(1, log.EXPIRED)],
            ["pins/a.json"],
        ],
        ids=["newest", "kept", "leaving", "all", "expired", "pin"],
    )
    def test_nothing_changes_where_needs_are_not_known(self, merged: FeatureStore, damaged: list[str]) -> None:
        expire_to(merged, 3)
        pin(merged, "a", 3)
        for path in damaged:
            spoil(merged, path)
        before = merged.storage.entries()
        for dry_run in (True, False):
            with raises(CorruptFileError, Problem.BROKEN_UNTIL_MENDED, reason=re.compile("|".join(damaged))):
                expire_to(merged, 1, dry_run=dry_run)
        assert merged.storage.entries() == before

    @pytest.mark.parametrize("folder", ["log", "expired"])
    def test_what_a_damaged_manifest_named_waits_for_the_grace_time(self, merged: FeatureStore, folder: str) -> None:
        held = merged.snapshot(2)
        alone = needs(held) - needs(merged.snapshot(3)) - needs(merged.snapshot(4))
        if folder == "expired":
            expire_to(merged, 2)
        age(merged, 6 if folder == "expired" else 10)
        spoil(merged, log.manifest_path(2, folder))
        repair(merged)
        report = expire_to(merged, 2)
        assert report.num_damaged == 1 and report.num_files == 0
        age(merged, 6.9)
        output = run("expire", merged.url, "--keep-last", 2, "--keep-days", 0).output
        assert "what 1 manifest named that a repair put aside" in output
        assert needs(held) <= paths_in(merged)
        age(merged, 0.2)
        report = expire_to(merged, 2)
        assert report.num_damaged == 0 and alone and needs(held) & paths_in(merged) == needs(held) - alone


class TestLate:
    def test_nothing_happens_after_half_the_grace(self, merged: FeatureStore) -> None:
        merged.stage_part("dead", "p", make_rows(3, merged.info))
        age(merged, 8)
        report = expire_to(merged, 1, grace_days=1e-12)
        assert (report.kept, report.expired, report.num_files, report.is_complete) == ((1, 2, 3, 4), (), 0, False)
        assert "run it again" in run("expire", merged.url, "--grace-days", 1e-12, code=1).stderr
        assert merged.staged_parts("dead") == ["p"]
        assert expire_to(merged, 1).expired == (1, 2, 3)

    def test_it_stops_between_two_deletions(self, merged: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
        for part in ("a", "b", "c"):
            merged.stage_part("dead", part, make_rows(3, merged.info))
        age(merged, 8)
        monkeypatch.setattr("featurestore.upkeep.expiry._DELETED_AT_ONCE", 1)
        start_s, calls = time.monotonic(), []

        def slow(done: int, total: int) -> None:
            calls.append((done, total))  # expiry's clock alone: Dask's loop in this process would sleep for days
            later = SimpleNamespace(monotonic=lambda: start_s + 3.6 * DAY_S)
            monkeypatch.setattr("featurestore.upkeep.expiry.time", later)

        report = expire_to(merged, 10, progress=slow)
        assert (calls, report.num_files, report.is_complete) == ([(1, 3)], 1, False)
        assert len(merged.staged_parts("dead")) == 2

    def test_copies_that_a_killed_run_left(self, merged: FeatureStore) -> None:
        """That of a snapshot that leaves gets its grace from now on, that of one that stays goes."""
        for version in (2, 4):
            path = log.manifest_path(version)
            merged.storage.write_bytes(log.manifest_path(version, log.EXPIRED), merged.storage.read_bytes(path))
        age(merged, 3)
        expire_to(merged, 10)
        assert log.versions(merged.storage, log.EXPIRED) == [2, 4], "another run may be at work"
        age(merged, 5)
        report = expire_to(merged, 1)
        assert log.versions(merged.storage, log.EXPIRED) == [1, 2, 3]
        assert report.num_files == 0 and report.num_waiting > 0


class TestCommand:
    def test_it_says_what_it_did(self, merged: FeatureStore) -> None:
        merged.stage_part("dead", "p", make_rows(3, merged.info))
        age(merged, 40)
        before = paths_in(merged)
        dry = run("expire", merged.url, "--keep-last", 1, "--dry-run", code=0)
        lines = dry.output.splitlines()
        assert lines[:2] == ["would keep 1 snapshot: 4", "would expire 3: 1 to 3"]
        assert lines[2].startswith("would delete 1 file, ") and lines[2].endswith("dead runs: dead")
        assert lines[3].startswith("left ") and lines[3].endswith("for the grace time")
        assert paths_in(merged) == before
        named = {line.strip() for line in lines if line.startswith("  ")}
        lines = run("expire", merged.url, "--keep-last", 1).output.splitlines()
        assert named == {path for path in before - paths_in(merged) if not path.startswith("log/")}
        assert lines[:2] == ["kept 1 snapshot: 4", "expired 3: 1 to 3"]
        age(merged, 40)  # what has waited, and the copies of manifests
        lines = run("expire", merged.url, "--dry-run").output.splitlines()
        named = {line.strip() for line in lines if line.startswith("  ")}
        before = paths_in(merged)
        run("expire", merged.url)
        assert named == before - paths_in(merged) and any(path.startswith("expired/") for path in named)


def test_a_copy_that_another_takes_away_is_made_again(merged: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that saw a pin, which has been withdrawn since, because it saw the copy."""
    needed = needs(merged.snapshot(1))

    def without_pins(storage: Storage) -> list[Pin]:
        storage.delete(log.manifest_path(1, log.EXPIRED))
        return []

    age(merged, 8)
    monkeypatch.setattr("featurestore.upkeep.history.read_pins", without_pins)
    expire_to(merged, 1)
    assert log.versions(merged.storage, log.EXPIRED) == [1, 2, 3]
    assert needed <= paths_in(merged)
