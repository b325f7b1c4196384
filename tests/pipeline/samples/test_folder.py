"""The files of samples, and the folder that takes its place as a whole."""

import dataclasses
import random

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client, LocalCluster

from pipeline.errors import SampleError, SampleOptionError
from pipeline.samples import build as build_module
from pipeline.samples import logs as pieces_module
from pipeline.samples.build import build_samples
from pipeline.samples.groups import batch_of_hours
from pipeline.samples.publish import replaced_files
from tests.pipeline.samples.rows import DAY_S, all_bytes, done, in_pieces, random_logs, read, shown, table, write


def test_equal_logs_give_equal_bytes_whatever_cluster_and_partitions(options, client, tmp_path, monkeypatch):
    rng = random.Random(1)
    impressions, behaviors = random_logs(rng)
    write(tmp_path / "logs", in_pieces(rng, impressions), in_pieces(rng, behaviors))
    options = dataclasses.replace(options, test_days=2, partitions=1)
    build_samples(options, client)
    expected = all_bytes(options.samples)
    assert len(expected) > 10
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=":0") as cluster,
        Client(cluster) as processes,
    ):
        build_samples(dataclasses.replace(options, partitions=7), processes)
    assert all_bytes(options.samples) == expected
    monkeypatch.setattr(pieces_module, "PIECE_ROWS", 10)
    for path in tmp_path.glob("logs/*/*"):
        path.unlink()
    write(tmp_path / "logs", in_pieces(rng, impressions), in_pieces(rng, behaviors))  # shuffled anew
    build_samples(dataclasses.replace(options, partitions=3), client)
    assert all_bytes(options.samples) == expected


def test_a_long_day_becomes_several_sorted_files_and_short_ones_few_tasks(build, tmp_path, monkeypatch):
    assert batch_of_hours({0: 100, 1: 100, 2: 100, 5: 300, 6: 1}) == {0: 0, 1: 0, 2: 1, 5: 2, 6: 3}, "few share one"
    impressions = [shown(at_s, user=at_s, session=at_s) for at_s in range(0, DAY_S, 60)]
    rows, _ = build(impressions, [done(0)], groups_per_file=500, partitions=5)
    files = sorted(path.name for path in (tmp_path / "samples/train").iterdir())
    assert files == [f"day=2026-01-01-00{number}.parquet" for number in range(3)]
    assert [row["user"] for row in rows] == [row["user"] for row in impressions]
    tasks, original = {}, build_module.run_all

    def counted(client, stage, function, calls, hint):
        tasks[stage] = len(calls)
        return original(client, stage, function, calls, hint)

    monkeypatch.setattr(build_module, "run_all", counted)
    monkeypatch.setattr(build_module, "num_threads", lambda client: 2)
    build([shown(day * DAY_S, user=day) for day in range(60)], [done(0)])
    assert len(list((tmp_path / "samples/train").iterdir())) == 60 and tasks["write samples"] == 4


def test_logs_at_another_address_and_in_folders_by_day(options, client, tmp_path):
    memory = fsspec.filesystem("memory")
    for path, rows in {"impressions/day=1/a.parquet": [shown(100)], "behaviors/b.parquet": [done(0)]}.items():
        logged = table(rows)
        image = logged.schema.get_field_index("image")
        views = logged.set_column(image, "image", logged["image"].cast(pa.string_view()))
        pq.write_table(views, tmp_path / "one.parquet")
        memory.pipe_file(f"/sample-logs/{path}", (tmp_path / "one.parquet").read_bytes())
    build_samples(dataclasses.replace(options, logs="memory://sample-logs"), client)
    assert [row["behavior_item"] for row in read(options.samples)] == [[6]]


def test_a_rerun_replaces_everything_and_one_that_fails_nothing(build, tmp_path, monkeypatch):
    old, _ = build([shown(0, image="old.jpg"), shown(5 * DAY_S)], [done(0, image="old.jpg")])
    with monkeypatch.context() as broken:
        broken.setattr("pipeline.samples.build.summarise", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build([shown(DAY_S)], [done(0)])
    assert read(tmp_path / "samples") == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "samples"]
    rows, _ = build([shown(DAY_S, image="new.jpg")], [done(0, image="b.jpg")])
    assert [row["day"] for row in rows] == ["2026-01-02"]
    files = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert files == ["images.parquet", "quarantine.parquet", "summary.json", "test", "train"]
    named = pq.read_table(tmp_path / "samples" / "images.parquet")
    assert sorted(named["uri"].to_pylist()) == ["b.jpg", "new.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "samples"]


def test_a_folder_of_something_else_and_a_file_are_not_replaced(build, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.samples.build.shuffle", lambda *_: pytest.fail("worked before it looked"))
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "thesis.txt").write_text("years of work")
    with pytest.raises(SampleError, match="samples has files that are not samples"):
        build([shown(0)], [done(0)])
    assert (tmp_path / "samples" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "samples").rename(tmp_path / "other")
    (tmp_path / "samples").write_text("")
    with pytest.raises(SampleError, match="is a file"):
        build([shown(0)], [done(0)])


def test_remains_of_a_killed_run_go_and_neither_a_running_one_nor_others(tmp_path):
    target = tmp_path / "samples"
    killed = tmp_path / ".samples.building-1"
    killed.mkdir()
    (killed / ".lock").touch()
    with replaced_files(str(target)) as running:
        assert not killed.exists()
        with replaced_files(str(target)) as other:
            assert running.folder.exists()
            (other.folder / "summary.json").write_text("other")
            (other.folder / "train").mkdir()
        (running.folder / "summary.json").write_text("running")
    assert (target / "summary.json").read_text() == "running"
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]
    (tmp_path / "made").mkdir()
    (tmp_path / "made/summary.json").write_text("of something else")
    lacks = pytest.raises(SampleOptionError, match=r"not samples \(it has no train\).*would be replaced")
    with lacks, replaced_files(str(tmp_path / "made")):
        pass
