"""The door to files on a disk, in memory and on S3: whole files, exclusive creation, translated errors."""

import errno
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from featurestore.errors import StorageError
from featurestore.storage import Storage


class ClientError(Exception):
    """Shaped like botocore's."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}}


class ScriptedFiles:
    """An object store's client that answers each put as told; None stores the object."""

    def __init__(self, answers: list[Exception | str | None]) -> None:
        self.answers = answers
        self.objects: dict[str, bytes] = {}

    def pipe_file(self, path: str, data: bytes, mode: str) -> None:
        assert mode == "create"
        answer = self.answers.pop(0)
        if answer is None:
            self.objects[path] = data
        elif isinstance(answer, str):
            raise OSError(errno.EINVAL, answer) from ClientError(answer)
        else:
            raise answer


@pytest.fixture(params=["disk", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "disk":
        return Storage(tmp_path / "root")
    return Storage(request.getfixturevalue("memory_url" if request.param == "memory" else "s3_url"))


def scripted(answers: list[Any]) -> tuple[Storage, ScriptedFiles]:
    storage = Storage("s3://bucket/store")
    files = ScriptedFiles(answers)
    storage._remote._client = os.getpid(), files
    return storage, files


def test_reading_writing_listing_and_deleting(storage: Storage) -> None:
    assert storage.list("a") == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("a/b.bin")
    with pytest.raises(FileNotFoundError):
        storage.size("a/b.bin")
    storage.write_bytes("a/b.bin", b"one")
    storage.write_bytes("a/b.bin", b"second")
    storage.write_bytes("a/c/d.bin", b"")
    assert storage.read_bytes("a/b.bin") == b"second"
    assert storage.size("a/b.bin") == 6
    assert storage.list("a") == ["b.bin", "c"]
    with storage.open_input("a/b.bin") as file:
        file.seek(3)
        assert file.read() == b"ond"
    storage.delete("a")
    storage.delete("a")
    assert storage.entries("a") == []  # some servers keep the empty folder


def test_entries_are_all_files_below_with_size_and_time(storage: Storage) -> None:
    assert storage.entries() == [] and storage.entries("a") == []
    before = storage.now()
    for path, size in (("a/b.bin", 3), ("a/c/d.bin", 0), ("a/.tmp-dead", 2), ("ab/e.bin", 1)):
        storage.write_bytes(path, bytes(size))
    after = storage.now()
    sizes = {entry.path: entry.size_bytes for entry in storage.entries("a")}
    assert sizes == {"a/b.bin": 3, "a/c/d.bin": 0, "a/.tmp-dead": 2}
    assert [entry.path for entry in storage.entries("a", recursive=False)] == ["a/.tmp-dead", "a/b.bin"]
    assert [entry.path for entry in storage.entries()] == ["a/.tmp-dead", "a/b.bin", "a/c/d.bin", "ab/e.bin"]
    assert all(before <= entry.mtime_s <= after for entry in storage.entries())
    assert storage.entry("a/b.bin") in storage.entries()
    assert storage.entries("a/b.bin") == []


def test_only_the_first_exclusive_create_wins(storage: Storage) -> None:
    assert storage.create_exclusive("log/1.json", b"mine")
    assert not storage.create_exclusive("log/1.json", b"yours")
    assert storage.read_bytes("log/1.json") == b"mine"
    assert storage.list("log") == ["1.json"]


def test_an_output_that_fails_leaves_nothing_behind(storage: Storage) -> None:
    storage.write_bytes("a.bin", b"old")
    with pytest.raises(RuntimeError), storage.open_output("a.bin") as file:
        file.write(b"half")
        raise RuntimeError
    with pytest.raises(RuntimeError), storage.open_output("b.bin") as file:
        file.write(b"half")
        raise RuntimeError
    assert storage.list() == ["a.bin"]
    assert storage.read_bytes("a.bin") == b"old"


def test_a_refusing_disk_is_a_storage_error_with_its_cause(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    storage = Storage(tmp_path / "file")  # a folder is needed where a file is
    for attempt in (
        lambda: storage.write_bytes("a", b""),
        lambda: storage.create_exclusive("a", b""),
        lambda: storage.read_bytes("a"),
    ):
        with pytest.raises(StorageError, match="cannot") as caught:
            attempt()
        assert isinstance(caught.value.__cause__, OSError)


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    storage = Storage(tmp_path)
    with pytest.raises(StorageError, match="No space left"):
        storage.write_bytes("a.bin", b"data")
    with pytest.raises(StorageError, match="No space left"):
        storage.create_exclusive("b.bin", b"data")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_protocol_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nonsense"):
        Storage("nonsense://x").read_bytes("a")


@pytest.mark.parametrize("code", ["PreconditionFailed", "412"])
def test_s3_a_failed_precondition_means_another_was_first(code: str) -> None:
    storage, files = scripted([code])
    assert not storage.create_exclusive("log/1.json", b"x")
    assert files.objects == {}


def test_s3_some_servers_say_it_by_file_exists() -> None:
    assert not scripted([FileExistsError("log/1.json")])[0].create_exclusive("log/1.json", b"x")


def test_s3_a_conflict_means_try_again() -> None:
    storage, files = scripted(["ConditionalRequestConflict", "409", None])
    assert storage.create_exclusive("log/1.json", b"x")
    assert list(files.objects.values()) == [b"x"]


def test_s3_other_errors_are_storage_errors() -> None:
    with pytest.raises(StorageError, match="AccessDenied"):
        scripted(["AccessDenied"])[0].create_exclusive("log/1.json", b"x")


def test_it_pickles_as_its_address(memory_url: str) -> None:
    storage = Storage(memory_url)
    storage.write_bytes("a", b"1")
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.url == storage.url and copy.read_bytes("a") == b"1"


def test_importing_the_package_is_quick_silent_and_without_torch() -> None:
    code = "import sys, featurestore; print([m for m in ('torch', 's3fs', 'dask', 'horovod') if m in sys.modules])"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n" and done.stderr == ""
    assert time.perf_counter() - start < 5
