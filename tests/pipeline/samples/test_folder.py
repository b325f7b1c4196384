"""The files of samples, and the folder that takes its place as a whole."""

import dataclasses
import random
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client, LocalCluster

from pipeline.errors import SampleError, SampleOptionError
from pipeline.samples import build as build_module
from pipeline.samples import logs as pieces_module
from pipeline.samples.build import build_samples
from pipeline.samples.publish import replaced_files
from tests.pipeline.samples.rows import (
    DAY_S,
    all_bytes,
    behavior_items,
    done,
    in_pieces,
    random_logs,
    read,
    shown,
    table,
    write,
)


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


def test_long_day_becomes_several_sorted_files(options, client, tmp_path):
    impressions = [shown(at_s, user=at_s, session=at_s) for at_s in range(0, DAY_S, 60)]
    write(tmp_path / "logs", [table(impressions)], [table([done(0)])])
    build_samples(dataclasses.replace(options, groups_per_file=500, partitions=5), client)
    files = sorted(path.name for path in (tmp_path / "samples/train").iterdir())
    assert files == [f"day=2026-01-01-00{number}.parquet" for number in range(3)]
    rows = read(options.samples)
    assert [row["user"] for row in rows] == [row["user"] for row in impressions]


def test_days_of_a_few_rows_are_written_by_few_tasks(build, tmp_path, monkeypatch):
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
    assert behavior_items(read(options.samples)) == [[6]]


# Published as a whole


def test_rerun_replaces_everything(build, tmp_path):
    build([shown(0, image="old.jpg"), shown(5 * DAY_S)], [done(0, image="old.jpg")])
    rows, _ = build([shown(DAY_S, image="new.jpg")], [done(0, image="b.jpg")])
    assert [row["day"] for row in rows] == ["2026-01-02"]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "images.parquet", "quarantine.parquet", "summary.json", "test", "train",
    ]  # fmt: skip
    named = pq.read_table(tmp_path / "samples" / "images.parquet")
    assert sorted(named["uri"].to_pylist()) == ["b.jpg", "new.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "samples"]


def test_failed_run_leaves_the_old_samples_and_nothing_else(build, tmp_path, monkeypatch):
    rows, _ = build([shown(0)], [done(0)])
    monkeypatch.setattr("pipeline.samples.build.summarise", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build([shown(DAY_S)], [done(0)])
    assert read(tmp_path / "samples") == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "samples"]


def test_folder_of_something_else_is_not_replaced(build, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.samples.build.shuffle", lambda *_: pytest.fail("worked before it looked"))
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "thesis.txt").write_text("years of work")
    with pytest.raises(SampleError, match="samples has files that are no samples"):
        build([shown(0)], [done(0)])
    assert (tmp_path / "samples" / "thesis.txt").read_text() == "years of work"


def test_file_in_place_of_the_folder_is_named(build, tmp_path):
    (tmp_path / "samples").write_text("")
    with pytest.raises(SampleError, match="is a file"):
        build([shown(0)], [done(0)])


def test_a_summary_alone_is_no_sign_of_samples(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made/summary.json").write_text("of something else")
    lacks = pytest.raises(SampleOptionError, match=r"no samples \(it has no train\).*would be replaced")
    with lacks, replaced_files(str(tmp_path / "made")):
        pass


def test_remains_of_a_killed_run_go_and_a_running_one_stays(tmp_path):
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
