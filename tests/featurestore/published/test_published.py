"""Versions of files on a real S3 server: readers of one version, and expiry; races are in tests/simulated."""

import pickle
from pathlib import Path

import pytest

from featurestore.errors import StorageError
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
from tests.faulty import FaultyStorage, preceded_by


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


@pytest.fixture
def aged(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """By how many seconds files are older, by a part of their path; the others are new."""
    entries, ages = Storage.entries, dict[str, float]()

    def older(storage: Storage, path: str = "", recursive: bool = True) -> list[StorageEntry]:
        return [
            each._replace(mtime_s=each.mtime_s - sum(age for start, age in ages.items() if start in each.path))
            for each in entries(storage, path, recursive)
        ]

    monkeypatch.setattr(Storage, "entries", older)
    return ages


def test_versions_replaced_long_ago_go_with_their_files(
    storage: Storage, first: PublishedFiles, tmp_path: Path, aged: dict[str, float]
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


def test_a_file_of_versions_that_an_expiry_does_not_know_stays(tmp_path: Path) -> None:
    """Its process was suspended, while others published two versions and removed all before them."""
    place = Storage(tmp_path / "place")
    publish(place, {"a": write_part(place, "a", b"a")})

    def others() -> None:
        kept = dict(newest(place).published.files)
        for name in "bc":
            kept[name] = write_part(place, name, name.encode())
            publish(place, kept)
        expire(place, -1)

    away = FaultyStorage(place, {"read_bytes": preceded_by(others)})
    assert not any(path.startswith("files/") for path in expire(away, -1))
    found = newest(place)
    assert [found.read_bytes(name) for name in found.list()] == [b"a", b"b", b"c"]
