"""Samples on a real S3 server: the bytes of a build on disk, days that are added, and readers of one version."""

import dataclasses
import itertools
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from distributed import Client

from featurestore.errors import CommitConflictError
from featurestore.published.versions import PublishedFiles, open_published, upload
from featurestore.storage.storage import Storage
from pipeline.errors import SampleError
from pipeline.options import SampleOptions
from pipeline.samples import publish as publish_module
from pipeline.samples.added import add_days
from pipeline.samples.build import build_samples
from pipeline.samples.publish import MARK, replaced_files
from tests.fuse import FORK, Fuse
from tests.pipeline.samples.rows import DAY_S, done, shown, table, write
from trainer.comm import SoloComm
from trainer.samples.columns import files_by_day
from trainer.samples.index import open_index
from trainer.samples.reader import SampleReader
from trainer.schema.fields import SETTINGS_FILE, load_schema


def version_at(url: str) -> PublishedFiles:
    opened = open_published(url)
    assert isinstance(opened, PublishedFiles)
    return opened


@pytest.fixture
def there(options: SampleOptions, client: Client, tmp_path: Path, s3_url: str) -> SampleOptions:
    """Samples of four days on S3, a user each, with behaviours of the day before; the log has a fifth day by now."""

    def log(days: int) -> None:
        impressions = [shown(day * DAY_S + 9_000 + user, user=user) for day in range(days) for user in range(5)]
        behaviors = [done(day * DAY_S + user, user=user, item=day) for day in range(days) for user in range(5)]
        write(tmp_path / "logs", [table(impressions)], [table(behaviors)])

    log(4)
    options = dataclasses.replace(options, samples=f"{s3_url}/samples", test_days=1, scratch=str(tmp_path / "scratch"))
    build_samples(options, client)
    log(5)
    return SampleOptions(samples=options.samples, scratch=options.scratch)


FIFTH = {"days": "2026-01-05"}


class TestAddDays:
    def test_files_of_other_days_are_not_written_again(self, there: SampleOptions, client: Client) -> None:
        before = version_at(there.samples)
        assert add_days(dataclasses.replace(there, **FIFTH), client)["days"] == ["2026-01-05"]
        after = version_at(there.samples)
        assert (before.published.version, after.published.version) == (1, 2)
        places = {name.rpartition("/")[2]: file.path for name, file in before.published.files.items()}
        moved = {name: file.path for name, file in after.published.files.items() if "day=" in name}
        assert list(moved) == ["test/day=2026-01-05-000.parquet", *(f"train/{name}" for name in sorted(places)[:4])]
        assert all(path == places[name.rpartition("/")[2]] for name, path in list(moved.items())[1:])
        assert list(files_by_day(after)) == [f"2026-01-0{day}" for day in range(1, 6)]

    def test_who_reads_goes_on_with_the_files_of_its_version(self, there: SampleOptions, client: Client) -> None:
        schema = load_schema()

        def reader() -> SampleReader:
            index = open_index(SoloComm(), there.samples, "train", schema)
            return SampleReader(index, schema, batch_size=4, seed=1)

        old = reader()
        expected = [batch.group_id_B.tolist() for batch in old.batches()]
        began = old.batches()
        first = next(began)
        add_days(dataclasses.replace(there, days="2026-01-02,2026-01-05"), client)
        assert [each.group_id_B.tolist() for each in [first, *began]] == expected
        assert [each.group_id_B.tolist() for each in old.batches()] == expected
        assert reader().num_samples == old.num_samples + 5

    def test_samples_that_were_copied_there_are_added_to(
        self, there: SampleOptions, client: Client, options: SampleOptions, s3_url: str
    ) -> None:
        """They lie in train/ and test/, without a version."""
        disk, copied = Path(options.samples), Storage(f"{s3_url}/copied")
        build_samples(dataclasses.replace(options, test_days=1), client)
        (disk / "test" / "day=2026-01-05-000.parquet").rename(disk / "old")
        for file in [*disk.glob("t*/*.parquet"), disk / MARK]:
            copied.write_bytes(str(file.relative_to(disk)), file.read_bytes())
        add_days(SampleOptions(samples=copied.url, **FIFTH), client)
        after = version_at(copied.url)
        assert after.full("train/day=2026-01-01-000.parquet") == copied.full("train/day=2026-01-01-000.parquet")
        assert after.read_bytes("test/day=2026-01-05-000.parquet") == (disk / "old").read_bytes()

    @pytest.mark.parametrize("on_disk", [False, True])
    def test_of_two_at_once_one_is_told_to_run_again(
        self,
        there: SampleOptions,
        client: Client,
        options: SampleOptions,
        monkeypatch: pytest.MonkeyPatch,
        on_disk: bool,
    ) -> None:
        if on_disk:
            build_samples(options, client)
            there = SampleOptions(samples=options.samples)
        from pipeline.samples import added

        original, runs = added.build.write, []

        def slow(*arguments):
            runs.append(0)
            if len(runs) == 1:  # the other one begins and ends meanwhile
                add_days(dataclasses.replace(there, days="2026-01-03"), client)
            return original(*arguments)

        monkeypatch.setattr(added.build, "write", slow)
        with pytest.raises(CommitConflictError, match="run it again"):
            add_days(dataclasses.replace(there, **FIFTH), client)
        monkeypatch.undo()
        add_days(dataclasses.replace(there, **FIFTH), client)
        assert "2026-01-05" in files_by_day(open_published(there.samples))


class TestWhole:
    def test_a_whole_build_replaces_whatever_came_meanwhile(
        self, there: SampleOptions, client: Client, options: SampleOptions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = publish_module.versions.publish

        def late(*arguments):
            monkeypatch.undo()
            add_days(dataclasses.replace(there, **FIFTH), client)
            return original(*arguments)

        monkeypatch.setattr(publish_module.versions, "publish", late)
        build_samples(dataclasses.replace(options, samples=there.samples, test_days=3), client)
        after = version_at(there.samples)
        assert (after.published.version, len(after.list("test"))) == (3, 3)

    def test_a_place_with_other_files_is_left_alone(self, options: SampleOptions, build: Callable, s3_url: str) -> None:
        Storage(s3_url).write_bytes("thesis.txt", b"years of work")
        with pytest.raises(SampleError, match="has files that are no samples"):
            build([shown(0)], [done(0)], samples=s3_url)
        assert Storage(s3_url).list() == ["thesis.txt"]

    def test_what_a_killed_first_build_left_is_no_hindrance(self, build: Callable, tmp_path: Path, s3_url: str) -> None:
        (tmp_path / "one").write_text("half of a build")
        upload(Storage(s3_url), tmp_path / "one", "train/day=2026-01-01-000.parquet")
        build([shown(0)], [done(0)], samples=s3_url)
        assert version_at(s3_url).list("train") == ["day=2026-01-01-000.parquet"]

    def test_schema_and_settings_lie_there_for_people(self, build: Callable, tmp_path: Path, s3_url: str) -> None:
        mapping = tmp_path / "mapping.yaml"
        mapping.write_text("impressions: {}\nbehaviors: {}\n")
        rows = [shown(at_s, user=at_s % 3, item=at_s % 7, image=f"{at_s % 7}.jpg") for at_s in range(60)]
        build(rows, [done(0)], samples=s3_url, mapping=str(mapping))
        assert f"schema_file: {s3_url}/schema.yaml" in Storage(s3_url).read_bytes(SETTINGS_FILE).decode()
        index = open_index(SoloComm(), s3_url, "train", load_schema(f"{s3_url}/schema.yaml"))
        assert index.num_samples == 60


def test_killed_at_any_write_it_is_the_old_or_the_new_version(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of one version, never half of another; what a killed run left in the scratch folder goes."""
    monkeypatch.setattr(publish_module, "_UPLOADS", 1)
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
