"""Snapshots over time: the log, times, what differs between two, restore, and pins and channels that keep them."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from featurestore import FeaturePartition, FeatureRows, FeatureStore, errors, log
from featurestore.flight.server import OpenSnapshots
from featurestore.problems import Problem
from featurestore.published.versions import read_moves, version_name
from featurestore.storage.storage import Storage
from featurestore.upkeep.expiry import expire
from featurestore.upkeep.history import diff, move_channel, pin, read_pins, remove_channel, restore, unpin
from featurestore.upkeep.history import log as log_of
from featurestore.upkeep.verify import repair, verify
from tests.faulty import faulty, made_but_lost, preceded_by
from tests.featurestore.conftest import make_rows, put
from tests.featurestore.contents import run, spoil
from tests.raised import raises, told


def test_times_of_commits_never_run_backwards(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clocks of their writers say; the log is a table that has them."""
    for seed, seconds in enumerate((10, 90, 15, 95)):
        monkeypatch.setattr("featurestore.store.time", SimpleNamespace(time=lambda now=seconds: 1_800_000_000.0 + now))
        put(store, 1, seed=seed)
    assert [store.snapshot(version).manifest.time_s - 1_800_000_000 for version in (1, 2, 3, 4)] == [10, 90, 90, 95]
    pin(store, "keep-it", 3)
    names, newest, pinned = run("log", store.url, "--last", 2, code=0).output.splitlines()
    expected = ["version", "committed", "operation", "files", "rows", "bytes", "writer", "pinned", "channels"]
    assert names.split() == expected
    assert newest.split()[:5] == ["4", "2027-01-15", "08:01:35", "UTC", "put"]
    assert pinned.split()[2] == "08:01:30" and pinned.rstrip().endswith("keep-it")


def test_the_log_is_newest_first_with_pins_and_channels(nine: FeatureStore) -> None:
    """A damaged manifest does not hide the others."""
    pin(nine, "b", 8)
    pin(nine, "a", 8)
    move_channel(nine, "stable", 7)
    spoil(nine, log.manifest_path(4))
    entries = log_of(nine)
    assert [entry.version for entry in entries] == list(range(9, 0, -1))
    assert [entry.pins for entry in entries[:3]] == [(), ("a", "b"), ()]
    assert [entry.channels for entry in entries] == [(), (), ("stable",), *[()] * 6]
    assert entries[2].manifest == nine.snapshot(7).manifest
    assert [entry.version for entry in entries if entry.manifest is None] == [4]
    assert [entry.version for entry in log_of(nine, last=2)] == [9, 8]


class TestDiff:
    def test_a_touched_image_is_no_change_but_another_size_is(self, store: FeatureStore) -> None:
        rows = put(store, 3)
        store.put(FeatureRows(**{**rows.__dict__, "source_tag": ["new"] * 3}))
        store.put(FeatureRows(**{**rows.__dict__, "width_N": rows.width_N + np.array([0, 1, 0], np.int32)}))
        assert len(diff(store, 1, 2).changed) == 0
        assert diff(store, 1, 3).changed.uris == ["images/1.jpg"]
        assert diff(store, 1, 3).changed.keys_N.tolist() == rows.keys_N[1:2].tolist()

    def test_shards_with_the_same_files_are_not_read(self, store: FeatureStore) -> None:
        put(store, 100)
        put(store, ["images/3.jpg"], seed=2)
        opened = []
        noted = {name: lambda read, path: opened.append(path) or read(path) for name in ("open_input", "read_bytes")}
        noting = faulty(store, **noted)
        assert diff(noting, 1, 2).changed.uris == ["images/3.jpg"]
        assert len({path.split("/")[1] for path in opened if path.startswith("data/")}) == 1


def test_a_restore_is_refused_whose_snapshot_expires_while_others_are_first(nine: FeatureStore) -> None:
    def others_are_first() -> None:
        put(nine, 1, first=5)
        expire(nine, keep_last=1, keep_days=0)

    with raises(errors.SnapshotNotFoundError, Problem.EXPIRED, where=nine.url, value=3):
        restore(faulty(nine, create_exclusive=preceded_by(others_are_first)), 3)


@pytest.mark.parametrize("kept_by", ["nothing", "a pin", "a channel"])
def test_a_writer_that_slept_for_weeks(nine: FeatureStore, kept_by: str) -> None:
    """Even the copies are gone. Where no name keeps any, its version would have been the first to go."""

    def others() -> None:
        for first in (20, 30, 40):
            nine.put(make_rows(1, nine.info, first=first), "others")
        if kept_by != "nothing":
            pin(nine, "other") if kept_by == "a pin" else move_channel(nine, "other", 12)
        expire(nine, keep_last=1, keep_days=0)
        nine.storage.delete(log.EXPIRED)

    slow, mine = faulty(nine, create_exclusive=preceded_by(others)), make_rows(1, nine.info, first=50)
    if kept_by != "nothing":
        with raises(errors.StorageError, Problem.UNKNOWN_IF_LOGGED, where=nine.storage.full(log.manifest_path(10))):
            slow.put(mine)
    else:
        assert slow.put(mine).version == 13
        assert log.versions(nine.storage) == [12, 13]


class TestCommands:
    def test_log_restore_pin_and_unpin(self, nine: FeatureStore, tmp_path: Path) -> None:
        empty = FeatureStore.create(tmp_path / "empty", nine.info.kind)
        assert run("log", empty.url).output == "no snapshot yet: nothing was committed\n"
        assert run("restore", nine.url, 4).output == "snapshot 10 holds what snapshot 4 holds\n"
        assert run("pin", nine.url, "a").output == "a keeps snapshot 10\n"
        assert run("unpin", nine.url, "a").output == "a is not a pin any more\n"

    def test_diff_counts_and_lists(self, store: FeatureStore) -> None:
        rows = put(store, 3, seed=1)
        put(store, 1, seed=2)
        store.delete(rows.keys_N[2:])
        put(store, 1, first=9)
        assert run("diff", store.url, 1, 4).output == "snapshot 1 to 4: 1 added, 1 changed, 1 removed\n"
        words = [line.split() for line in run("diff", store.url, 1, 4, "--keys").output.splitlines()]
        assert [first for first, *_ in words[:3]] == ["+", "~", "-"]
        assert [uri for _, _, uri, *_ in words[:3]] == ["images/9.jpg", "images/0.jpg", "images/2.jpg"]
        assert int(words[1][1]) == rows.keys_N[0]


class TestPins:
    def test_mistakes_and_damage_are_named(self, nine: FeatureStore, tmp_path: Path) -> None:
        assert pin(faulty(nine, create_exclusive=made_but_lost), "a", 4).version == 4
        with raises(errors.PinError, Problem.NAME_TAKEN, where="a", version=4):
            pin(nine, "a", 5)
        with raises(errors.PinError, Problem.NO_PIN, where=nine.url, value="b", known="a"):
            unpin(nine, "b")
        for name in ("", ".hidden", "a/b", "a b", "x" * 101):
            with raises(errors.PinError, Problem.NOT_A_PIN_NAME, value=name):
                pin(nine, name, 4)
        with raises(errors.SnapshotNotFoundError, Problem.NO_SNAPSHOT, where=nine.url, value=12):
            pin(nine, "c", 12)
        with raises(errors.SnapshotNotFoundError, Problem.NOTHING_TO_PIN, where=tmp_path / "empty"):
            pin(FeatureStore.create(tmp_path / "empty", nine.info.kind), "a")
        assert [made.name for made in read_pins(nine.storage)] == ["a"]
        spoil(nine, "pins/a.json")
        found = {"reason": re.compile(r"pins/a\.json is damaged"), "hint": re.compile(f"unpin {nine.url} a, and pin")}
        with raises(errors.CorruptFileError, Problem.BROKEN_UNTIL_MENDED, **found):
            read_pins(nine.storage)
        unpin(nine, "a")
        assert read_pins(nine.storage) == []

    def test_one_that_sees_the_copy_of_an_expiry_is_refused_and_not_left(self, nine: FeatureStore) -> None:
        nine.storage.write_bytes(log.manifest_path(4, log.EXPIRED), nine.storage.read_bytes(log.manifest_path(4)))
        with raises(errors.SnapshotNotFoundError, Problem.EXPIRING, where=nine.url, version=4):
            pin(nine, "late", 4)
        assert read_pins(nine.storage) == []


def test_mistakes_with_channels_are_named(nine: FeatureStore) -> None:
    for name in ("", "19", "1st", "a/b", "../x", ".hidden", "a b", "newest", "NULL", "x" * 65):
        with raises(errors.ChannelError, Problem.NOT_A_CHANNEL_NAME, value=name):
            move_channel(nine, name, 4)
    assert nine.storage.list(log.CHANNELS) == []
    with raises(errors.ChannelError, Problem.NO_CHANNEL, where=nine.url, value="stabel", known="none"):
        nine.snapshot("stabel")
    assert move_channel(faulty(nine, create_exclusive=made_but_lost), "stable", 4).version == 4
    assert len(read_moves(nine.storage, "stable")) == 1
    move_channel(nine, "candidate", 9)
    with raises(errors.ChannelError, Problem.NO_CHANNEL, value="stabel", known="candidate, stable"):
        nine.snapshot("stabel")
    remove_channel(nine, "stable")
    with raises(errors.ChannelError, Problem.NO_CHANNEL, value="stable", known="candidate"):
        remove_channel(nine, "stable")
    with raises(errors.SnapshotNotFoundError, Problem.NO_SNAPSHOT, where=nine.url, value=99):
        move_channel(nine, "stable", 99)
    # What a person types for a snapshot:
    assert (version_name("19"), version_name("-1"), version_name("stable")) == (19, -1, "stable")
    for text in ("1.5", "a/b", "", "newest"):
        with pytest.raises(ValueError, match=told(Problem.NOT_A_VERSION, value=text)):
            version_name(text)


def test_partition_and_server_know_channels(nine: FeatureStore, tmp_path: Path) -> None:
    move_channel(nine, "stable", 4)
    with FeaturePartition.load(nine.url, cache_dir=tmp_path / "cache", version="stable") as partition:
        assert partition.snapshot_id.version == 4
        assert partition.snapshot_id.commit_id == nine.snapshot(4).manifest.commit_id
    offered = OpenSnapshots(nine, version="stable", cache_dir=tmp_path / "cache")
    assert offered.newest == 4 and not offered.follow()
    for version in (7, 4):  # back, too
        move_channel(nine, "stable", version)
        assert offered.follow() and offered.newest == version


def test_another_commit_under_the_number_is_refused(nine: FeatureStore, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    shutil.copytree(nine.url, backup)
    put(nine, 1, seed=10)
    move_channel(nine, "stable", 10)
    shutil.copytree(Path(nine.url) / "channels", backup / "channels")
    restored = FeatureStore.open(backup)
    put(restored, 1, seed=11)
    with raises(errors.AnotherStoreError, Problem.ANOTHER_COMMIT, where=backup, value="stable", version=10):
        restored.snapshot("stable")
    assert [problem.kind for problem in verify(restored).problems] == ["channel"]


def test_a_damaged_move_is_told_stops_an_expiry_and_is_mended_by_the_next(nine: FeatureStore) -> None:
    move_channel(nine, "stable", 4)
    move = Path(nine.url) / "channels/stable" / f"{1:020d}.json"
    move.write_bytes(b"{}")
    hint = f"set the channel again: crossmedia store channel {nine.url} stable N"
    found = {"reason": re.compile(f"^{move} is damaged"), "hint": hint}
    with raises(errors.CorruptFileError, Problem.BROKEN_UNTIL_MENDED, **found):
        nine.snapshot("stable")
    with raises(errors.CorruptFileError, Problem.BROKEN_UNTIL_MENDED, **found):
        expire(nine, keep_last=1, keep_days=0)
    assert log.versions(nine.storage) == list(range(1, 10))
    assert [problem.kind for problem in verify(nine).problems] == ["channel"]
    assert [problem.kind for problem in repair(nine).left] == ["channel"]
    move_channel(nine, "stable", 5)
    assert nine.snapshot("stable").version == 5 and verify(nine).problems == []


def test_commands_of_a_day_with_channels(nine: FeatureStore) -> None:
    assert "no channel yet" in run("channel", nine.url).output
    assert run("channel", nine.url, "stable", 4).output == "stable points to snapshot 4\n"
    assert run("channel", nine.url, "candidate", "stable").output == "candidate points to snapshot 4\n"
    assert run("channel", nine.url, "stable", 7).exit_code == 0
    names, first, second = run("channel", nine.url).output.splitlines()
    assert "rows in files" in names
    assert first.split()[:2] == ["candidate", "4"] and second.split()[:2] == ["stable", "7"]
    _, newest, oldest = run("channel", nine.url, "stable").output.splitlines()
    assert newest.split()[:2] == ["2", "7"] and oldest.split()[:2] == ["1", "4"]
    info = run("info", nine.url, "--version", "stable").output
    assert "snapshot                 7 (put)" in info
    assert "channels                 candidate at 4, stable at 7" in info
    shown = {line.split()[0]: line.split()[-1] for line in run("log", nine.url).output.splitlines()[1:]}
    assert (shown["7"], shown["4"]) == ("stable", "candidate")
    assert "snapshot candidate to stable" in run("diff", nine.url, "candidate", "stable").output
    assert run("channel", nine.url, "candidate", "--remove").output == "candidate is not a channel any more\n"
    gone = told(Problem.NO_CHANNEL, where=nine.url, value="candidate", known="stable")
    assert re.search(gone, run("info", nine.url, "--version", "candidate").output)


def test_a_snapshot_that_expires_while_the_log_is_listed_is_left_out(
    nine: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = log.versions

    def then_one_expires(storage: Storage) -> list[int]:
        found = listed(storage)
        storage.delete(log.manifest_path(4))
        return found

    monkeypatch.setattr(log, "versions", then_one_expires)
    assert [each.version for each in log_of(nine)] == [9, 8, 7, 6, 5, 3, 2, 1]
