"""The files of samples: a folder that is replaced as a whole, and the versions of an address, on a real S3 server."""

import dataclasses
import itertools
import random
import signal
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client, LocalCluster

from featurestore.errors import CommitConflictError
from featurestore.published.versions import PublishedFiles, open_published, upload
from featurestore.storage.storage import Storage
from pipeline.errors import SampleError, SampleOptionError
from pipeline.options import SampleOptions
from pipeline.problems import Problem
from pipeline.samples import added, groups, logs, publish
from pipeline.samples import build as build_module
from pipeline.samples.build import build_samples
from pipeline.samples.groups import batch_of_hours, write_batches
from pipeline.samples.publish import MARK, replaced_files
from tests.fuse import FORK, Fuse
from tests.pipeline.samples.rows import (
    DAY_S,
    Call,
    all_bytes,
    done,
    random_logs,
    read,
    replaced,
    shown,
    table,
    users_of_days,
    write_in_pieces,
)
from tests.raised import raises
from trainer.comm import SoloComm
from trainer.samples.columns import files_by_day
from trainer.samples.index import open_index
from trainer.samples.reader import SampleReader
from trainer.schema.fields import SETTINGS_FILE, load_schema
from trainer.schema.names import by_bucket

FIFTH = "2026-01-05"


def test_equal_logs_give_equal_bytes_whatever_cluster_and_partitions(options, client, tmp_path, monkeypatch):
    rng = random.Random(1)
    impressions, behaviors = random_logs(rng)
    write_in_pieces(tmp_path / "logs", rng, impressions, behaviors)
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
    monkeypatch.setattr(logs, "PIECE_ROWS", 10)
    write_in_pieces(tmp_path / "logs", rng, impressions, behaviors)  # shuffled anew
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
        views = replaced(logged, "image", logged["image"].cast(pa.string_view()))
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


def test_names_are_the_same_however_many_ranges_are_read_at_a_time(tmp_path, monkeypatch):
    paths = [str(tmp_path / f"{part}.arrow") for part in range(2)]
    for part, path in enumerate(paths):
        keys_N = np.random.default_rng(part).integers(-(1 << 63), 1 << 63, 1_000)
        rows = pa.record_batch([keys_N, [f"{key}.jpg" for key in keys_N]], schema=logs.NAMES)
        write_batches(Path(path), by_bucket(rows))
    found = []
    for size in (1, 20_000, 1 << 30):
        monkeypatch.setattr(groups, "NAMES_AT_ONCE", size)
        groups._merge_names(tmp_path / "names.parquet", paths, logs.NAMES, None)
        found.append((tmp_path / "names.parquet").read_bytes())
    assert found == found[:1] * 3 and pq.read_metadata(tmp_path / "names.parquet").num_rows == 2_000


def test_a_folder_of_something_else_and_a_file_are_not_replaced(build, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.samples.build.shuffle", lambda *_: pytest.fail("worked before it looked"))
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "thesis.txt").write_text("years of work")
    with raises(SampleError, Problem.NOT_SAMPLES, where=tmp_path / "samples"):
        build([shown(0)], [done(0)])
    assert (tmp_path / "samples" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "samples").rename(tmp_path / "other")
    (tmp_path / "samples").write_text("")
    with raises(SampleError, Problem.NOT_A_FOLDER, where=tmp_path / "samples"):
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
    lacks = raises(SampleOptionError, Problem.NOT_SAMPLES, where=tmp_path / "made", lacking="train")
    with lacks, replaced_files(str(tmp_path / "made")):
        pass


def version_at(url: str) -> PublishedFiles:
    opened = open_published(url)
    assert isinstance(opened, PublishedFiles)
    return opened


@pytest.fixture
def there(build: Call, log: Call, tmp_path: Path, s3_url: str) -> SampleOptions:
    """Samples of four days on S3; the log has a fifth day by now."""
    made = SampleOptions(samples=f"{s3_url}/samples", scratch=str(tmp_path / "scratch"))
    build(*users_of_days(4), samples=made.samples, scratch=made.scratch, test_days=1)
    log(*users_of_days(5))
    return made


@pytest.fixture
def add_there(add: Call, there: SampleOptions) -> Call:
    return lambda days=FIFTH: add(samples=there.samples, scratch=there.scratch, days=days)


class TestAddDays:
    def test_files_of_other_days_are_not_written_again(self, there: SampleOptions, add_there: Call) -> None:
        before = version_at(there.samples)
        contents = {name: before.read_bytes(name) for name in before.published.files}
        assert add_there()["days"] == [FIFTH]
        assert {name: before.read_bytes(name) for name in contents} == contents, "nothing is written over"
        after = version_at(there.samples)
        assert (before.published.version, after.published.version) == (1, 2)
        places = {name.rpartition("/")[2]: file.path for name, file in before.published.files.items()}
        moved = {name: file.path for name, file in after.published.files.items() if "day=" in name}
        assert list(moved) == ["test/day=2026-01-05-000.parquet", *(f"train/{name}" for name in sorted(places)[:4])]
        assert all(path == places[name.rpartition("/")[2]] for name, path in list(moved.items())[1:])
        assert list(files_by_day(after)) == [f"2026-01-0{day}" for day in range(1, 6)]

    def test_who_reads_goes_on_with_the_files_of_its_version(self, there: SampleOptions, add_there: Call) -> None:
        schema = load_schema()

        def reader() -> SampleReader:
            index = open_index(SoloComm(), there.samples, "train", schema)
            return SampleReader(index, schema, batch_size=4, seed=1)

        old = reader()
        expected = [batch.group_id_B.tolist() for batch in old.batches()]
        began = old.batches()
        first = next(began)
        add_there("2026-01-02,2026-01-05")
        assert [each.group_id_B.tolist() for each in [first, *began]] == expected
        assert [each.group_id_B.tolist() for each in old.batches()] == expected
        assert reader().num_samples == old.num_samples + 5

    @pytest.mark.usefixtures("there")
    def test_copied_samples_are_added_to(self, client: Client, options: SampleOptions, add: Call, s3_url: str) -> None:
        """They lie in train/ and test/, without a version."""
        disk, copied = Path(options.samples), Storage(f"{s3_url}/copied")
        build_samples(dataclasses.replace(options, test_days=1), client)
        (disk / "test" / "day=2026-01-05-000.parquet").rename(disk / "old")
        for file in [*disk.glob("t*/*.parquet"), disk / MARK]:
            copied.write_bytes(str(file.relative_to(disk)), file.read_bytes())
        add(samples=copied.url, days=FIFTH)
        after = version_at(copied.url)
        assert after.full("train/day=2026-01-01-000.parquet") == copied.full("train/day=2026-01-01-000.parquet")
        assert after.read_bytes("test/day=2026-01-05-000.parquet") == (disk / "old").read_bytes()

    def test_one_of_two_is_told_to_rerun(
        self, there: SampleOptions, build: Call, add: Call, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build(*users_of_days(5))
        for place in ({}, {"samples": there.samples, "scratch": there.scratch}):  # on the disk, and there
            original, runs = added.build.write, []

            def slow(*arguments, runs=runs, place=place, original=original):
                runs.append(0)
                if len(runs) == 1:  # the other one begins and ends meanwhile
                    add(days="2026-01-03", **place)
                return original(*arguments)

            monkeypatch.setattr(added.build, "write", slow)
            with pytest.raises(CommitConflictError) as refused:
                add(days=FIFTH, **place)
            assert place or refused.value.problem is Problem.REPLACED_MEANWHILE
            monkeypatch.undo()
            assert add(days=FIFTH, **place)["days"] == [FIFTH]
        assert FIFTH in files_by_day(open_published(there.samples))


class TestWhole:
    def test_a_whole_build_replaces_whatever_came_meanwhile(
        self, there: SampleOptions, build: Call, add_there: Call, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = publish.versions.publish

        def late(*arguments):
            monkeypatch.undo()
            add_there()
            return original(*arguments)

        monkeypatch.setattr(publish.versions, "publish", late)
        build(*users_of_days(5), samples=there.samples, test_days=3)
        after = version_at(there.samples)
        assert (after.published.version, len(after.list("test"))) == (3, 3)

    def test_other_files_are_left_alone_but_half_a_build(self, build: Call, tmp_path: Path, s3_url: str) -> None:
        Storage(s3_url).write_bytes("thesis.txt", b"years of work")
        with raises(SampleError, Problem.NOT_SAMPLES, where=s3_url):
            build([shown(0)], [done(0)], samples=s3_url)
        assert Storage(s3_url).list() == ["thesis.txt"]
        (tmp_path / "one").write_text("half of a build")
        upload(Storage(f"{s3_url}/new"), tmp_path / "one", "train/day=2026-01-01-000.parquet")
        build([shown(0)], [done(0)], samples=f"{s3_url}/new")
        assert version_at(f"{s3_url}/new").list("train") == ["day=2026-01-01-000.parquet"]

    def test_schema_and_settings_lie_there_for_people(self, build: Call, tmp_path: Path, s3_url: str) -> None:
        mapping = tmp_path / "mapping.yaml"
        mapping.write_text("impressions: {}\nbehaviors: {}\n")
        rows = [shown(at_s, user=at_s % 3, item=at_s % 7, image=f"{at_s % 7}.jpg") for at_s in range(60)]
        build(rows, [done(0)], samples=s3_url, mapping=str(mapping))
        assert f"schema_file: {s3_url}/schema.yaml" in Storage(s3_url).read_bytes(SETTINGS_FILE).decode()
        index = open_index(SoloComm(), s3_url, "train", load_schema(f"{s3_url}/schema.yaml"))
        assert index.num_samples == 60


def test_killed_at_any_write_it_is_old_or_new(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of one version, never half of another; what a killed run left in the scratch folder goes."""
    monkeypatch.setattr(publish, "_UPLOADS", 1)
    url, scratch = f"{s3_url}/samples", tmp_path / "scratch"
    with replaced_files(url, scratch=str(scratch)) as files:
        (files.folder / "train").mkdir()
        for name in (MARK, "train/day=2026-01-01-000.parquet", "train/day=2026-01-02-000.parquet"):
            (files.folder / name).write_text(name)

    def publish_day(number: int) -> None:
        before = open_published(url)
        with replaced_files(url, before=before, scratch=str(scratch)) as new:
            for name in ("train/day=2026-01-01-000.parquet", "train/day=2026-01-02-000.parquet"):
                new.kept[name] = name
            (new.folder / "test").mkdir()
            (new.folder / "test" / "day=2026-01-05-000.parquet").write_text(f"day {number}")
            (new.folder / MARK).write_text(f"summary {number}")

    def content() -> dict[str, bytes]:
        storage = open_published(url)
        return {each.path: storage.read_bytes(each.path) for each in storage.entries()}

    publish_day(0)
    states = [content()]
    for at in range(1, 40):

        def writer(at: int = at) -> None:
            Fuse(at, tmp_path / "trace").watch_s3({"put_object", "delete_object", "delete_objects"})
            publish_day(at)

        process = FORK.Process(target=writer)
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        now = content()
        new = states[0] | {"test/day=2026-01-05-000.parquet": f"day {at}".encode(), MARK: f"summary {at}".encode()}
        assert now in (states[-1], new)
        states.append(now)
        if process.exitcode == 0:
            break
    assert process.exitcode == 0 and now == new and len(states) > 8
    assert any(one == other for one, other in itertools.pairwise(states))  # some deaths came before it
    assert list(scratch.iterdir()) == []
