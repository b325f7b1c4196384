"""Versions of files on a real S3 server: readers of one version, writers at once, death at every write, expiry."""

import contextlib
import pickle
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from featurestore.errors import CommitConflictError, StorageError
from featurestore.published.versions import (
    PublishedFile,
    PublishedFiles,
    expire,
    open_published,
    publish,
    upload,
    write_part,
)
from featurestore.storage.local import StorageEntry
from featurestore.storage.storage import Storage
from tests.faulty import FaultyStorage, opened_faulty, preceded_by
from tests.fuse import Fuse, small_process


@pytest.fixture
def storage(s3_url: str) -> Storage:
    return Storage(f"{s3_url}/samples")


def uploaded(storage: Storage, folder: Path, files: dict[str, str]) -> dict[str, PublishedFile]:
    found = {}
    for name, text in files.items():
        (folder / "one").write_text(text)
        found[name] = upload(storage, folder / "one", name)
    return found


def content(storage: Storage) -> dict[str, str]:
    """Every file that the splits list."""
    names = [f"{split}/{name}" for split in ("train", "test") for name in storage.list(split)]
    return {name: storage.read_bytes(name).decode() for name in names}


FIRST = {"train/day=1.parquet": "one", "test/day=2.parquet": "two"}
SECOND = {"train/day=1.parquet": "one", "train/day=2.parquet": "two", "test/day=3.parquet": "three"}


@pytest.fixture
def first(storage: Storage, tmp_path: Path) -> PublishedFiles:
    publish(storage, uploaded(storage, tmp_path, FIRST), after=0)
    return newest(storage)


def newest(storage: Storage) -> PublishedFiles:
    opened = open_published(storage.url)
    assert isinstance(opened, PublishedFiles)
    return opened


def publish_second(storage: Storage, first: PublishedFiles, folder: Path) -> None:
    kept = {"train/day=1.parquet": "train/day=1.parquet", "train/day=2.parquet": "test/day=2.parquet"}
    files = {name: first.published.files[before] for name, before in kept.items()}
    publish(storage, files | uploaded(storage, folder, {"test/day=3.parquet": "three"}), first.published.version)


class TestReading:
    def test_a_version_is_a_folder_that_never_changes(
        self, storage: Storage, first: PublishedFiles, tmp_path: Path
    ) -> None:
        sent = pickle.loads(pickle.dumps(first))  # as to another rank
        publish_second(storage, first, tmp_path)
        assert content(first) == content(sent) == FIRST
        assert content(newest(storage)) == SECOND
        with first.open_input("test/day=2.parquet") as file:
            assert file.read() == b"two"
        out = bytearray(3)
        assert (first.read_into("test/day=2.parquet", memoryview(out)), bytes(out)) == (3, b"two")
        assert first.size("test/day=2.parquet") == first.entry("test/day=2.parquet").size_bytes == 3
        assert first.list() == ["test", "train"]

    def test_what_a_version_does_not_have_is_not_there(self, storage: Storage, first: PublishedFiles) -> None:
        stray = next(iter(first.published.files.values())).path
        for path in ("train/day=9.parquet", stray):
            with pytest.raises(FileNotFoundError, match="version 1, has no file"):
                first.read_bytes(path)

    def test_nothing_is_written_through_it(self, first: PublishedFiles) -> None:
        for write in (
            lambda: first.write_bytes("train/day=1.parquet", b""),
            lambda: first.create_exclusive("train/new", b""),
            lambda: first.delete("train/day=1.parquet"),
            lambda: first.delete_files(["train/day=1.parquet"]),
        ):
            with pytest.raises(StorageError, match="version 1"):
                write()

    def test_plain_files_may_become_part_of_a_version(self, storage: Storage) -> None:
        storage.write_bytes("test/day=1.parquet", b"one")
        plain = PublishedFile(path="test/day=1.parquet", size_bytes=3)
        publish(storage, {"train/day=1.parquet": plain}, after=0)
        assert content(newest(storage)) == {"train/day=1.parquet": "one"}


class TestWriters:
    def test_of_many_at_once_one_publishes_after_a_version(
        self, storage: Storage, first: PublishedFiles, tmp_path: Path
    ) -> None:
        parts = [uploaded(storage, tmp_path, {"train/day=1.parquet": str(number)}) for number in range(6)]

        def attempt(files: dict[str, PublishedFile]) -> bool:
            try:
                publish(storage, files, after=first.published.version)
            except CommitConflictError:
                return False
            return True

        with ThreadPoolExecutor(6) as pool:
            won = list(pool.map(attempt, parts))
        assert sum(won) == 1
        assert content(newest(storage)) == {"train/day=1.parquet": str(won.index(True))}

    def test_a_file_that_is_gone_is_never_published(
        self, storage: Storage, first: PublishedFiles, tmp_path: Path
    ) -> None:
        files = uploaded(storage, tmp_path, {"train/day=1.parquet": "new"})
        storage.delete_files([files["train/day=1.parquet"].path])
        with pytest.raises(CommitConflictError, match="was removed before it was published"):
            publish(storage, files)
        assert content(newest(storage)) == FIRST


def publish_until(fuse: Fuse, url: str, before: PublishedFiles, folder: Path) -> None:
    fuse.watch_s3()
    publish_second(Storage(url), before, folder)


def test_killed_at_any_request_it_is_published_or_not(storage: Storage, first: PublishedFiles, tmp_path: Path) -> None:
    """And the same again publishes it, where it was not."""
    before, at, killed = first, 1, 0
    while True:
        process = small_process(publish_until, Fuse(at, tmp_path / "trace"), storage.url, before, tmp_path)
        process.start()
        process.join()
        now = newest(storage)
        is_new = now.published.version > before.published.version
        assert content(now) == (SECOND if is_new else content(before))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
        if is_new:  # back to the first one, for the next death
            publish(storage, first.published.files)
            before = newest(storage)
        at += 1
    assert is_new and killed >= 8  # before and after two puts, listings and the reading back


def make_older(patch: pytest.MonkeyPatch, ages: dict[str, float]) -> None:
    """As if the files whose path has one of these texts were older by its seconds."""
    entries = Storage.entries

    def older(storage: Storage, path: str = "", recursive: bool = True) -> list[StorageEntry]:
        return [
            each._replace(mtime_s=each.mtime_s - sum(age for start, age in ages.items() if start in each.path))
            for each in entries(storage, path, recursive)
        ]

    patch.setattr(Storage, "entries", older)


def expire_until(fuse: Fuse, url: str, ages: dict[str, float]) -> None:
    fuse.watch_s3({"delete_object", "delete_objects"})
    with pytest.MonkeyPatch.context() as patch:
        make_older(patch, ages)
        expire(Storage(url), 7 * 86_400)


class TestExpire:
    @pytest.fixture
    def aged(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
        """Ages, in seconds, of paths that begin so; the others are new."""
        ages: dict[str, float] = {}
        make_older(monkeypatch, ages)
        return ages

    def test_versions_replaced_long_ago_go_with_their_files(
        self, storage: Storage, first: PublishedFiles, tmp_path: Path, aged: dict[str, float]
    ) -> None:
        publish_second(storage, first, tmp_path)
        second = newest(storage)
        orphan = upload(storage, tmp_path / "one", "train/day=9.parquet").path  # of a writer that was killed
        storage.write_bytes("files/notes.txt", b"of a person")
        storage.write_bytes("train/day=0.parquet", b"plain")
        publish(storage, uploaded(storage, tmp_path, {"train/day=7.parquet": "seven"}))
        third = newest(storage)
        aged |= {"files/": 3 * 86_400, "versions/": 3 * 86_400}
        assert expire(storage, 7 * 86_400) == []
        assert content(first) == FIRST and content(second) == SECOND
        aged["0000001.json"] = aged["0000002.json"] = 86_400 * 9  # the first one was replaced long ago by the second
        removed = expire(storage, 7 * 86_400)
        assert removed == ["versions/00000000000000000001.json"]
        aged["files/"] = 9 * 86_400
        assert expire(storage, 7 * 86_400) == [orphan]
        assert content(second) == SECOND
        aged["0000003.json"] = 86_400 * 9
        assert len(expire(storage, 7 * 86_400)) == 1 + len(SECOND)
        assert content(newest(storage)) == content(third) == {"train/day=7.parquet": "seven"}
        assert storage.read_bytes("files/notes.txt") == b"of a person"
        assert storage.read_bytes("train/day=0.parquet") == b"plain"

    def test_files_of_a_writer_at_work_stay(self, storage: Storage, first: PublishedFiles, tmp_path: Path) -> None:
        files = uploaded(storage, tmp_path, {"train/day=1.parquet": "new"})
        assert expire(storage, 86_400) == []
        publish(storage, files)
        assert content(newest(storage)) == {"train/day=1.parquet": "new"}

    @pytest.mark.parametrize("step", [2, pytest.param(1, marks=pytest.mark.slow)])
    def test_killed_at_any_request_it_ends_the_next_time(
        self, storage: Storage, first: PublishedFiles, tmp_path: Path, aged: dict[str, float], step: int
    ) -> None:
        """Before each second thing that is asked, which is after the first; before and after each in the slow."""
        publish_second(storage, first, tmp_path)
        publish(storage, uploaded(storage, tmp_path, {"train/day=7.parquet": "seven"}))
        aged |= {"files/": 9 * 86_400, "versions/": 9 * 86_400}

        for at in range(1, 60, step):
            process = small_process(expire_until, Fuse(at, tmp_path / "trace"), storage.url, aged)
            process.start()
            process.join()
            assert content(newest(storage)) == {"train/day=7.parquet": "seven"}
            if process.exitcode == 0:
                break
        assert at > 3
        with contextlib.suppress(FileNotFoundError):
            assert len(storage.entries("files")) == 1


class TestWhoeverWasAway:
    """Processes that were suspended, while others published and removed old versions."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> Storage:
        return Storage(tmp_path / "place")

    @pytest.fixture
    def others(self, place: Storage) -> Callable[[], None]:
        """Publish two versions, and remove all before them."""

        def work() -> None:
            kept = dict(newest(place).published.files)
            for name in "bc":
                kept[name] = write_part(place, name, name.encode())
                publish(place, kept)
            expire(place, -1)

        publish(place, {"a": write_part(place, "a", b"a")})
        return work

    @pytest.mark.parametrize("after", [1, None])
    def test_nothing_is_published_in_a_number_that_became_free(
        self, place: Storage, others: Callable[[], None], after: int | None
    ) -> None:
        """Nor in the next one: the number may have been this process's own, and its files are going."""
        before = newest(place).published.files
        away = FaultyStorage(place, {"create_exclusive": preceded_by(others)})
        with pytest.raises(CommitConflictError, match="had been removed as this process was away"):
            publish(away, before, after)
        assert newest(place).published.version == 3
        assert publish(place, before).version == 4 and newest(place).list() == ["a"]

    def test_a_file_of_versions_that_an_expiry_does_not_know_stays(
        self, place: Storage, others: Callable[[], None]
    ) -> None:
        away = FaultyStorage(place, {"read_bytes": preceded_by(others)})
        assert not any(path.startswith("files/") for path in expire(away, -1))
        found = newest(place)
        assert [found.read_bytes(name) for name in found.list()] == [b"a", b"b", b"c"]

    def test_a_version_that_went_before_it_was_read_is_looked_for_again(
        self, place: Storage, others: Callable[[], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def go_once() -> None:
            monkeypatch.undo()
            others()

        opened_faulty(monkeypatch, {"read_bytes": preceded_by(go_once)}, "featurestore.published.versions")
        assert newest(place).list() == ["a", "b", "c"]
