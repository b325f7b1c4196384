"""The door to files: one contract for a disk, memory and two S3 servers, addresses, and files that are not regular."""

import errno
import io
import os
import pickle
import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import fsspec
import pytest
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.local import LocalFileSystem
from pyarrow import fs

from featurestore import errors
from featurestore.problems import Problem
from featurestore.published.paths import run_path
from featurestore.storage import remote
from featurestore.storage.local import DiskFiles, IrregularFileError, open_regular, read_regular, read_text
from featurestore.storage.safety import refuse_unsafe
from featurestore.storage.storage import Storage, in_threads
from tests.faulty import FaultyStorage
from tests.raised import raises, told
from tests.servers import client_of, fill


def read_into(storage: Storage, path: str, size: int) -> bytes:
    """The beginning of a file that is there with its 6 bytes."""
    out = bytearray(size)
    assert storage.read_into(path, memoryview(out)) == 6
    return bytes(out)


class TestEveryPlace:
    """What every place gives that a store may lie on."""

    @pytest.fixture
    def storage(self, place_url: str) -> Storage:
        return Storage(place_url)

    def test_reading_writing_listing_and_deleting(self, storage: Storage) -> None:
        assert storage.list("a") == []
        for look in (storage.read_bytes, storage.size, storage.open_input, lambda path: read_into(storage, path, 1)):
            with pytest.raises(FileNotFoundError):
                look("a/b.bin")
        storage.write_bytes("a/b.bin", b"one")
        storage.write_bytes("a/b.bin", b"second")
        storage.write_bytes("a/c/d.bin", b"")
        assert storage.read_bytes("a/b.bin") == b"second" == read_into(storage, "a/b.bin", 6)
        assert read_into(storage, "a/b.bin", 4) == b"seco" and read_into(storage, "a/b.bin", 8) == b"second\0\0"
        assert storage.size("a/b.bin") == 6
        assert storage.list("a") == ["b.bin", "c"]
        copy = pickle.loads(pickle.dumps(storage))
        assert copy.url == storage.url and copy.read_bytes("a/b.bin") == b"second"
        storage.delete("a")
        storage.delete("a")
        assert storage.entries("a") == []  # SeaweedFS keeps the empty folder

    def test_the_clock_is_asked_again_where_an_expiry_took_its_probe(self, storage: Storage) -> None:
        def taken(times: int) -> Storage:
            left = iter(range(times))

            def write(write_bytes: Callable[..., None], path: str, data: bytes) -> None:
                write_bytes(path, data)
                if next(left, None) is not None:
                    storage.delete(path)

            return FaultyStorage(storage, {"write_bytes": write})

        assert abs(taken(1).now() - time.time()) < 60
        with raises(errors.StorageError, Problem.PROBE_VANISHED, where=storage.url, times=5):
            taken(100).now()

    def test_entries_are_all_files_below_with_size_and_time(self, storage: Storage) -> None:
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
        assert before > time.time() - 60 and after < time.time() + 60
        assert storage.entry("a/b.bin") == storage.entries("a")[1]
        assert storage.entries("a/b.bin") == []

    def test_only_the_first_exclusive_create_wins(self, storage: Storage) -> None:
        assert storage.create_exclusive("log/1.json", b"mine")
        assert not storage.create_exclusive("log/1.json", b"yours")
        assert not storage.create_exclusive("log/1.json", b"")
        assert storage.read_bytes("log/1.json") == b"mine"
        assert storage.list("log") == ["1.json"]
        storage.delete("log/1.json")
        assert storage.create_exclusive("log/1.json", b"yours")

    def test_of_racing_creates_one_wins(self, storage: Storage) -> None:
        num_racers = 2 if storage.url.startswith("s3:") else 8  # SeaweedFS lets a third one wait for a second
        start = threading.Barrier(num_racers)

        def create(racer: int, path: str) -> bool:
            start.wait()
            return storage.create_exclusive(path, str(racer).encode())

        with ThreadPoolExecutor(num_racers) as pool:
            for number in range(10):
                path = f"log/{number}"
                won = list(pool.map(create, range(num_racers), [path] * num_racers))
                assert sum(won) == 1
                assert storage.read_bytes(path) == str(won.index(True)).encode()

    def test_an_output_that_fails_leaves_nothing_behind(self, storage: Storage) -> None:
        storage.write_bytes("a.bin", b"old")
        for path in ("a.bin", "b.bin"):
            with pytest.raises(RuntimeError), storage.open_output(path) as file:
                file.write(b"half")
                raise RuntimeError
        assert [entry.path for entry in storage.entries()] == ["a.bin"]
        assert storage.read_bytes("a.bin") == b"old"

    def test_an_open_file_is_read_in_any_order(self, storage: Storage) -> None:
        data = random.Random(0).randbytes(700_000)
        storage.write_bytes("a.bin", data)
        with storage.open_input("a.bin") as file:
            for start, size in ((0, 10), (699_990, 100), (300_000, 300_000), (5, 0), (10, 262_144), (700_000, 5)):
                assert file.seek(start) == start
                assert file.read(size) == data[start : start + size]
            assert file.seek(-4, io.SEEK_END) == 699_996 and file.read() == data[-4:]
            file.seek(1)
            assert file.seek(1, io.SEEK_CUR) == 2 and file.read() == data[2:]

    def test_names_are_no_patterns_and_no_prefixes(self, storage: Storage) -> None:
        names = ["a[1]/x", "a1/x", "a*/x", "ab/x", "a/x", "a b?/x"]
        for name in names:
            storage.write_bytes(name, name.encode())
        for name in ("a[1]", "a*", "a", "a b?"):
            assert [entry.path for entry in storage.entries(name)] == [f"{name}/x"]
            assert storage.list(name) == ["x"] and storage.read_bytes(f"{name}/x") == f"{name}/x".encode()
            storage.delete(name)
        assert [entry.path for entry in storage.entries()] == ["a1/x", "ab/x"]
        storage.delete_files(["a1/x", "never/there"])
        assert [entry.path for entry in storage.entries()] == ["ab/x"]

    def test_nothing_but_what_is_below_it_is_changed_or_read(self, storage: Storage) -> None:
        above = Storage(storage.url.rpartition("/")[0])
        name = storage.url.rpartition("/")[2]
        storage.write_bytes("a/b", b"1")
        above.write_bytes("victim/b", b"2")

        def output(path: str) -> None:
            with storage.open_output(path) as file:
                file.write(b"3")

        changes = [storage.delete, lambda path: storage.delete_files(["a/c", path]), output]
        changes += [
            lambda path, write=write: write(path, b"3")
            for write in (storage.write_bytes, storage.create_exclusive, storage.create_or_read)
        ]
        looks = [storage.read_bytes, storage.size, storage.list, storage.entries, storage.open_input]
        out = ["..", "../victim", "../victim/b", "a/../../victim", "/victim", "a/./b", ".", "a/..", "a\0b"]
        for act in changes + looks:
            for path in out + ["", "/"] * (act in changes):
                with raises(errors.StorageError, Problem.NOT_BELOW, where=storage.url, value=path):
                    act(path)
        found = {entry.path for entry in above.entries() if entry.path.startswith((f"{name}/", "victim/"))}
        assert found == {f"{name}/a/b", "victim/b"} and above.read_bytes("victim/b") == b"2"


def test_nothing_is_removed_behind_a_link(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "root")
    Storage(tmp_path).write_bytes("outside/b/c", b"1")
    storage.write_bytes("a/b", b"1")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    found = {"link": tmp_path / "root" / "link", "target": tmp_path / "outside"}
    for remove in (lambda: storage.delete("link/b"), lambda: storage.delete_files(["link/b/c"])):
        with raises(errors.CorruptFileError, Problem.LINK_LEADS_OUT, **found):
            remove()
    storage.delete("link")
    assert (tmp_path / "outside" / "b" / "c").read_bytes() == b"1" and storage.list() == ["a"]


def test_a_key_that_would_lead_out_is_not_there(memory_url: str) -> None:
    """Object stores take such keys, and their clients take them for others."""
    storage = Storage(memory_url)
    storage.write_bytes("a/b", b"1")
    files = fsspec.filesystem("memory").store
    root = storage.url.removeprefix("memory:/")
    files[f"{root}/a/../../victim"] = files[f"{root}/a/b"]
    assert [entry.path for entry in storage.entries("a")] == ["a/b"]
    storage.delete("a")
    assert files.pop(f"{root}/a/../../victim") and storage.entries() == []


class OwnFiles(LocalFileSystem):
    """A user's own fsspec client, own://: folders of this machine, in which a file appears complete."""

    protocol = "own"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("own://"))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        files = Storage(Path(path).parent)
        if mode != "create":
            files.write_bytes(Path(path).name, value)
        elif not files.create_exclusive(Path(path).name, value):
            raise FileExistsError(path)


class TestOwnClient(TestEveryPlace):
    @pytest.fixture
    def place_url(self, tmp_path: Path) -> str:
        fsspec.register_implementation("own", OwnFiles, clobber=True)
        return f"own://{tmp_path}/root"

    def test_it_can_hold_a_store(self, storage: Storage) -> None:
        refuse_unsafe(storage)


def test_what_another_client_does_is_seen_at_once(s3_url: str) -> None:
    storage = Storage(f"{s3_url}/store")
    storage.write_bytes("log/1", b"one")
    assert storage.list("log") == ["1"] and len(storage.entries()) == 1
    other = client_of(os.environ["AWS_ENDPOINT_URL"])
    other.pipe_file(storage.full("log/2"), b"2")
    other.pipe_file(storage.full("log/1"), b"other")
    assert storage.list("log") == ["1", "2"] and len(storage.entries()) == 2
    assert storage.size("log/1") == 5 and storage.read_bytes("log/1") == b"other"


def test_more_files_than_one_answer_of_a_listing_holds(s3_url: str) -> None:
    storage = Storage(f"{s3_url}/store")
    names = [f"{number:05d}" for number in range(1_050)]
    fill(storage.url.removeprefix("s3://"), {f"log/{name}": b"" for name in names})
    assert storage.list("log") == names
    assert [entry.path for entry in storage.entries()] == [f"log/{name}" for name in names]
    storage.delete("log")
    assert storage.entries() == []


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    storage = Storage(tmp_path / "file")  # a folder is needed where a file is
    for attempt in (
        lambda: storage.write_bytes("a", b""),
        lambda: storage.create_exclusive("a", b""),
        lambda: storage.read_bytes("a"),
        lambda: storage.delete("a"),
    ):
        with raises(errors.NotAFolderError, Problem.FILE_NOT_FOLDER, where=tmp_path / "file") as caught:
            attempt()
        assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize(
    ("write", "call"),
    [("write_bytes", "fsync"), ("create_exclusive", "fsync"), ("write_bytes", "replace"), ("create_exclusive", "link")],
)
def test_a_full_disk_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str, call: str) -> None:
    monkeypatch.setattr(os, call, Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with raises(errors.StorageError, Problem.REFUSED, where=tmp_path / "a.bin", reason="No space left on device"):
        getattr(Storage(tmp_path), write)("a.bin", b"data")
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_is_on_the_disk_before_its_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(tmp_path)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    Storage(tmp_path).write_bytes("data/0001/a", b"1")
    folders = [name for name in synced if ".tmp-" not in name]
    assert folders == [".", "data", "data/0001"]
    assert ".tmp-" in synced[2]


def test_an_unreadable_sector_is_damage_in_a_store_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiskFiles, "read_bytes", Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO))))
    with raises(errors.CorruptFileError, Problem.DISK_CANNOT_READ, where=tmp_path / "a"):
        Storage(tmp_path, keep_inside=True).read_bytes("a")
    with raises(errors.StorageError, Problem.REFUSED, action="read", where=tmp_path / "a"):
        Storage(tmp_path).read_bytes("a")


def test_a_fork_while_a_client_is_made_does_not_hang(memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, children = fsspec.filesystem, list[int]()

    def make_and_fork(protocol: str, **options: Any) -> Any:
        if not children:
            children.append(os.fork())
            if children == [0]:
                Storage(memory_url).write_bytes("a", b"1")
                os._exit(0)
        return make(protocol, **options)

    monkeypatch.setattr(fsspec, "filesystem", make_and_fork)
    monkeypatch.setenv("AWS_SDK_UA_APP_ID", memory_url)  # another environment, another client
    Storage(memory_url).list()
    (child,) = children
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended == (child, 0)


def test_what_a_client_says_in_several_lines_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As pyarrow does where there is no libhdfs."""
    storage, failure = Storage("memory://several-lines"), OSError("Unable to load libx\n  dlopen(libx.so) failed\n")
    monkeypatch.setattr(storage._remote, "read_bytes", Mock(side_effect=failure))
    found = {"action": "read", "where": storage.full("a"), "reason": "Unable to load libx dlopen(libx.so) failed"}
    with raises(errors.StorageError, Problem.REFUSED, **found):
        storage.read_bytes("a")


def test_hdfs_is_read_and_written_but_holds_no_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stores" / "a").mkdir(parents=True)
    opened: list[dict[str, object]] = []

    def of_folder(protocol: str, **options: object) -> ArrowFSWrapper:
        opened.append({"protocol": protocol, **options})
        return ArrowFSWrapper(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), skip_instance_cache=True)

    monkeypatch.setattr(fsspec, "filesystem", of_folder)
    monkeypatch.setattr(remote, "_clients", {})
    storage = Storage("hdfs://namenode:8020/stores/a")
    assert storage.url == "hdfs://namenode:8020/stores/a"
    storage.write_bytes("x.json", b"one")
    storage.write_bytes("x.json", b"two")
    assert [each.name for each in (tmp_path / "stores" / "a").iterdir()] == ["x.json"], "no half of a file is seen"
    assert storage.read_bytes("x.json") == b"two" and storage.list() == ["x.json"]
    (entry,) = storage.entries()
    assert (entry.path, entry.size_bytes) == ("x.json", 3) and abs(entry.mtime_s - storage.now()) < 60
    with storage.open_input("x.json") as file:
        assert file.read() == b"two"
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("nosuch")
    for use in (lambda: storage.create_exclusive("y", b""), lambda: refuse_unsafe(storage)):
        with raises(errors.UnsafeBackendError, Problem.NO_ATOMIC_CREATE, where="hdfs"):
            use()
    assert opened == [{"protocol": "hdfs", "host": "namenode", "port": 8020}]
    storage.delete("x.json")
    assert storage.entries() == []


@pytest.mark.parametrize("opened", [Storage, run_path])
@pytest.mark.parametrize(
    ("address", "problem", "values"),
    [
        *[
            (each, Problem.ADDRESS_WITHOUT_BUCKET, {})
            for each in ("s3://", "s3:///x", "s3:/", "s3a://", "s3:///x/y", str(Path("s3://")))
        ],
        ("S3://bucket/x", Problem.UNKNOWN_SCHEME, {"value": "S3", "known": "s3"}),
    ],
)
def test_an_address_that_leads_nowhere_gets_a_line(
    opened: Callable[[str], object], address: str, problem: Problem, values: dict[str, str]
) -> None:
    with raises(errors.AddressError, problem, where=re.compile(rf"^{address}[^\n]*$"), **values) as raised:
        opened(address)
    assert raised.value.exit_code == errors.USAGE and "\n" not in str(raised.value)


def test_names_of_files_that_begin_like_an_address_are_files() -> None:
    assert Storage("s3:x").is_local and Storage("s3").is_local and run_path("s3:x") == Path("s3:x")


def test_a_bucket_that_is_not_there_is_named_by_writing_and_holds_nothing(missing_bucket: str) -> None:
    storage = Storage(f"{missing_bucket}/runs")
    uses: list[Callable[[], object]] = [
        storage.check_bucket,
        storage.now,
        lambda: storage.write_bytes("a", b"x"),
        lambda: storage.create_exclusive("a", b"x"),
    ]
    for use in uses:
        where = re.compile("nobucket/runs")
        with raises(errors.BucketNotFoundError, Problem.NO_BUCKET, where=where, bucket="nobucket") as raised:
            use()
        assert raised.value.exit_code == errors.USAGE
    assert storage.list() == [] == storage.entries()
    storage.delete("a")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("a")


@pytest.mark.timeout(20)
def test_a_pipe_or_a_device_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    doors: list[Callable[[Path], object]] = [open_regular, read_regular, read_text]
    for door in doors:
        for place in (tmp_path / "pipe", tmp_path / "link", Path("/dev/null")):
            with pytest.raises(IrregularFileError, match=told(Problem.NOT_REGULAR) + "$"):
                door(place)
    storage = Storage(tmp_path)
    for read in (storage.read_bytes, storage.open_input, storage.entry, lambda path: read_into(storage, path, 1)):
        with raises(errors.StorageError, Problem.REFUSED, where=tmp_path / "pipe", reason=Problem.NOT_REGULAR):
            read("pipe")


@pytest.mark.parametrize("ahead", [None, 5])
def test_threads_begin_together_only_where_one_takes_long(monkeypatch: pytest.MonkeyPatch, ahead: int | None) -> None:
    together, counted = threading.Barrier(4), list[tuple[int, int]]()

    def meet(item: int) -> int:
        together.wait(30)  # all four of them, or an error
        return item

    assert [*in_threads(meet, range(8), 4, lambda *count: counted.append(count), ahead)] == [*range(8)]
    assert counted == [(done, 8) for done in range(1, 9)]
    monkeypatch.setattr("featurestore.storage.storage._ALONE_S", 60.0)
    assert len({*in_threads(lambda _: threading.get_ident(), range(100), 4, ahead=ahead)}) == 1
    assert [*in_threads(meet, [], 4)] == []
