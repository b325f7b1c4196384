"""Versions of files on a real S3 server: readers of one version, and expiry; races are in tests/simulated."""

import pickle
from pathlib import Path

import pytest

from featurestore.errors import StorageError
from featurestore.problems import Problem
from featurestore.published.versions import PublishedFile, PublishedFiles, expire, open_published, publish, write_part
from featurestore.storage.local import StorageEntry
from featurestore.storage.storage import Storage
from tests.faulty import FaultyStorage, preceded_by
from tests.raised import raises, told

FIRST = {"train/day=1.parquet": "one", "test/day=2.parquet": "two"}
SECOND = {"train/day=1.parquet": "one", "train/day=2.parquet": "two", "test/day=3.parquet": "three"}


@pytest.fixture
def storage(s3_url: str) -> Storage:
    return Storage(f"{s3_url}/samples")


@pytest.fixture
def first(storage: Storage) -> PublishedFiles:
    publish(storage, written(storage, FIRST), after=0)
    return newest(storage)


def written(storage: Storage, files: dict[str, str]) -> dict[str, PublishedFile]:
    return {name: write_part(storage, name, text.encode()) for name, text in files.items()}


def newest(storage: Storage) -> PublishedFiles:
    opened = open_published(storage.url)
    assert isinstance(opened, PublishedFiles)
    return opened


def content(storage: Storage) -> dict[str, str]:
    """Every file that the splits list."""
    names = [f"{split}/{name}" for split in ("train", "test") for name in storage.list(split)]
    return {name: storage.read_bytes(name).decode() for name in names}


def publish_second(storage: Storage, first: PublishedFiles) -> PublishedFiles:
    one, two = (first.published.files[name] for name in FIRST)
    files = {"train/day=1.parquet": one, "train/day=2.parquet": two}
    publish(storage, files | written(storage, {"test/day=3.parquet": "three"}), first.published.version)
    return newest(storage)


def test_a_version_is_a_folder_that_never_changes(storage: Storage, first: PublishedFiles) -> None:
    sent = pickle.loads(pickle.dumps(first))  # as to another rank
    second = publish_second(storage, first)
    assert content(first) == content(sent) == FIRST
    assert content(second) == SECOND
    with first.open_input("test/day=2.parquet") as file:
        assert file.read() == b"two"
    out = bytearray(3)
    assert (first.read_into("test/day=2.parquet", memoryview(out)), bytes(out)) == (3, b"two")
    assert first.size("test/day=2.parquet") == first.entry("test/day=2.parquet").size_bytes == 3
    assert first.list() == ["test", "train"]
    for path in ("train/day=9.parquet", first.published.files["train/day=1.parquet"].path):
        with pytest.raises(FileNotFoundError, match=told(Problem.NO_SUCH_FILE, where=first.url, version=1, value=path)):
            first.read_bytes(path)
    for write, path in (
        (lambda path: first.write_bytes(path, b""), "train/day=1.parquet"),
        (lambda path: first.create_exclusive(path, b""), "train/new"),
        (first.delete, "train/day=1.parquet"),
        (first.delete_files, ["train/day=1.parquet"]),
    ):
        with raises(StorageError, Problem.ALREADY_PUBLISHED, where=first.url, file=path, version=1):
            write(path)


def test_plain_files_may_become_part_of_a_version(storage: Storage) -> None:
    storage.write_bytes("test/day=1.parquet", b"one")
    plain = PublishedFile(path="test/day=1.parquet", size_bytes=3)
    publish(storage, {"train/day=1.parquet": plain}, after=0)
    assert content(newest(storage)) == {"train/day=1.parquet": "one"}


def test_versions_replaced_long_ago_go_with_their_files(
    storage: Storage, first: PublishedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = publish_second(storage, first)
    orphan = write_part(storage, "train/day=9.parquet", b"of a writer that was killed").path
    storage.write_bytes("files/notes.txt", b"of a person")
    storage.write_bytes("train/day=0.parquet", b"plain")
    publish(storage, written(storage, {"train/day=7.parquet": "seven"}))
    third = newest(storage)
    entries = Storage.entries
    age_s = {"files/": 3 * 86_400, "versions/": 3 * 86_400}  # of files, by a part of their path; the others are new

    def older(storage: Storage, path: str = "", recursive: bool = True) -> list[StorageEntry]:
        return [
            each._replace(mtime_s=each.mtime_s - sum(age for part, age in age_s.items() if part in each.path))
            for each in entries(storage, path, recursive)
        ]

    monkeypatch.setattr(Storage, "entries", older)
    assert expire(storage, 7 * 86_400) == []
    assert content(first) == FIRST and content(second) == SECOND
    age_s["0000001.json"] = age_s["0000002.json"] = 86_400 * 9  # the first one was replaced long ago by the second
    assert expire(storage, 7 * 86_400) == ["versions/00000000000000000001.json"]
    age_s["files/"] = 9 * 86_400
    assert expire(storage, 7 * 86_400) == [orphan]
    assert content(second) == SECOND
    age_s["0000003.json"] = 86_400 * 9
    assert len(expire(storage, 7 * 86_400)) == 1 + len(SECOND)
    assert content(newest(storage)) == content(third) == {"train/day=7.parquet": "seven"}
    assert storage.read_bytes("files/notes.txt") == b"of a person"
    assert storage.read_bytes("train/day=0.parquet") == b"plain"


def test_a_file_of_versions_that_an_expiry_does_not_know_stays(tmp_path: Path) -> None:
    """Its process was suspended, while others published two versions and removed all before them."""
    place = Storage(tmp_path / "place")
    publish(place, written(place, {"a": "a"}))

    def others() -> None:
        for name in "bc":
            publish(place, dict(newest(place).published.files) | written(place, {name: name}))
        expire(place, -1)

    away = FaultyStorage(place, {"read_bytes": preceded_by(others)})
    assert not any(path.startswith("files/") for path in expire(away, -1))
    found = newest(place)
    assert [found.read_bytes(name) for name in found.list()] == [b"a", b"b", b"c"]
