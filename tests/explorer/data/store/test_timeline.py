"""The line of snapshots: what each commit wrote, pins, and manifests that are damaged or gone."""

from explorer.data.store.snapshots import Timeline
from featurestore import log
from featurestore.upkeep.history import move_channel, pin
from tests.explorer.stores import storied


def test_lines_say_what_commits_wrote_and_who_points_to_them(tmp_path):
    """Pins and channels also on lines that were read before."""
    store, timeline = storied(tmp_path / "store"), Timeline()
    assert [line.pins + line.channels for line in timeline.lines(store, [4, 3, 2, 1])] == [()] * 4
    pin(store, "before", 2)
    move_channel(store, "stable", 1)
    move_channel(store, "candidate", 3)
    move_channel(store, "stable", 3, "promoted")
    lines = timeline.lines(store, [4, 3, 2, 1])
    assert [line.version for line in lines] == [4, 3, 2, 1]
    assert [line.operation for line in lines] == ["refresh", "delete", "refresh", "extract"]
    assert [line.rows_written for line in lines] == [1, 0, 8, 40]
    assert [line.rows_deleted for line in lines] == [0, 2, 0, 0]
    assert [line.file_rows for line in lines] == [51, 50, 48, 40]
    assert [line.pins for line in lines] == [(), (), ("before",), ()]
    assert [line.channels for line in lines] == [(), ("candidate", "stable"), (), ()]


def test_a_damaged_manifest_is_a_line_and_an_expired_one_is_none(tmp_path):
    store = storied(tmp_path / "store")
    path = tmp_path / "store" / log.manifest_path(3)
    path.write_bytes(path.read_bytes().replace(b"delete", b"delite"))
    (tmp_path / "store" / log.manifest_path(2)).unlink()
    lines = Timeline().lines(store, [4, 3, 2, 1])
    assert [(line.version, line.is_damaged) for line in lines] == [(4, False), (3, True), (1, False)]
    assert lines[0].rows_written is None
    assert lines[2].rows_written == 40


def test_lines_are_quick_when_they_are_known_or_few(tmp_path):
    store, timeline = storied(tmp_path / "store"), Timeline()
    assert timeline.is_quick(store, [1, 2, 3, 4], 4)
    assert not timeline.is_quick(store, [1, 2, 3, 4], 4096)
    timeline.lines(store, [1, 2, 3])
    assert timeline.is_quick(store, [1, 2, 3, 4], 4096)
