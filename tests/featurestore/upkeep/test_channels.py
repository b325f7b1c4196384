"""Channels: set, moved by several writers, kept by expire, looked up wherever a snapshot is chosen, on disk and S3."""

import shutil
from pathlib import Path

import pytest

from featurestore import FeaturePartition, FeatureStore, errors, log
from featurestore.flight.server import OpenSnapshots
from featurestore.published.versions import read_moves, version_name
from featurestore.upkeep.expiry import expire
from featurestore.upkeep.history import log as log_of_store
from featurestore.upkeep.history import move_channel, remove_channel
from featurestore.upkeep.verify import repair, verify
from tests.faulty import faulty, made_but_lost
from tests.featurestore.conftest import put
from tests.featurestore.contents import run

pytestmark = pytest.mark.long


def test_names_and_mistakes(nine: FeatureStore) -> None:
    for name in ("", "19", "1st", "a/b", "../x", ".hidden", "a b", "newest", "NULL", "x" * 65):
        with pytest.raises(errors.ChannelError, match="not the name of a channel"):
            move_channel(nine, name, 4)
    assert nine.storage.list(log.CHANNELS) == []
    with pytest.raises(errors.ChannelError, match=r"has no channel 'stabel'; it has none"):
        nine.snapshot("stabel")
    assert move_channel(faulty(nine, create_exclusive=made_but_lost), "stable", 4).version == 4
    assert len(read_moves(nine.storage, "stable")) == 1
    move_channel(nine, "candidate", 9)
    with pytest.raises(errors.ChannelError, match=r"has no channel 'stabel'; it has candidate, stable"):
        nine.snapshot("stabel")
    remove_channel(nine, "stable")
    with pytest.raises(errors.ChannelError, match=r"no channel 'stable'; it has candidate"):
        remove_channel(nine, "stable")
    with pytest.raises(errors.SnapshotNotFoundError, match="no snapshot 99"):
        move_channel(nine, "stable", 99)
    # What a person types for a snapshot:
    assert (version_name("19"), version_name("-1"), version_name("stable")) == (19, -1, "stable")
    for text in ("1.5", "a/b", "", "newest"):
        with pytest.raises(ValueError, match="neither the number"):
            version_name(text)


def test_partition_log_and_server_know_channels(nine: FeatureStore, tmp_path: Path) -> None:
    move_channel(nine, "stable", 4)
    with FeaturePartition.load(nine.url, cache_dir=tmp_path / "cache", version="stable") as partition:
        assert partition.snapshot_id.version == 4
        assert partition.snapshot_id.commit_id == nine.snapshot(4).manifest.commit_id
    assert [entry.channels for entry in log_of_store(nine)] == [
        (("stable",) if version == 4 else ()) for version in range(9, 0, -1)
    ]
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
    with pytest.raises(errors.AnotherStoreError, match="points to snapshot 10 of commit"):
        restored.snapshot("stable")
    assert [problem.kind for problem in verify(restored).problems] == ["channel"]


def test_a_damaged_move_is_told_stops_an_expiry_and_is_mended_by_the_next(nine: FeatureStore) -> None:
    move_channel(nine, "stable", 4)
    (Path(nine.url) / "channels/stable" / f"{1:020d}.json").write_bytes(b"{}")
    with pytest.raises(errors.CorruptFileError, match=r"set the channel again: crossmedia store channel"):
        nine.snapshot("stable")
    with pytest.raises(errors.CorruptFileError):
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
    told = run("info", nine.url, "--version", "stable").output
    assert "snapshot                 7 (put)" in told
    assert "channels                 candidate at 4, stable at 7" in told
    shown = {line.split()[0]: line.split()[-1] for line in run("log", nine.url).output.splitlines()[1:]}
    assert (shown["7"], shown["4"]) == ("stable", "candidate")
    assert "snapshot candidate to stable" in run("diff", nine.url, "candidate", "stable").output
    assert run("channel", nine.url, "candidate", "--remove").output == "candidate is not a channel any more\n"
    assert "no channel 'candidate'; it has stable" in run("info", nine.url, "--version", "candidate").output
