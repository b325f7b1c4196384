"""Errors at the door to fsspec, each kind told apart; a disk that is full; and an S3 server that fails or cuts."""

import errno
import random
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import botocore.exceptions
import fsspec
import numpy as np
import pytest
from fsspec.exceptions import FSTimeoutError
from multidict import CIMultiDict, CIMultiDictProxy
from s3fs.errors import translate_boto_error
from yarl import URL

from featurestore import FeaturePartition, FeatureStore, StoreInfo, keys_of_uris, log
from featurestore.errors import StorageError
from featurestore.problems import Problem
from featurestore.storage import remote
from featurestore.storage.remote import RemoteFiles
from featurestore.storage.storage import Storage
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import expire
from featurestore.upkeep.verify import verify
from tests.faulty import full_from
from tests.featurestore.conftest import make_rows, put
from tests.proxy import Fault, Proxy, Request
from tests.raised import raises

NUM_SHARDS = 4


def answer(code: str, status: int = 400) -> OSError:
    """What s3fs raises when the server answers so."""
    response = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(botocore.exceptions.ClientError(response, "PutObject"))


def web_answer(status: int) -> aiohttp.ClientResponseError:
    """What the client of http raises when the server answers so."""
    url = URL("http://x/a.jpg")
    return aiohttp.ClientResponseError(
        aiohttp.RequestInfo(url, "GET", CIMultiDictProxy(CIMultiDict()), url), (), status=status
    )


THROTTLED = [answer("SlowDown", 503), answer("ServiceUnavailable", 503), answer("503", 503), answer("429", 429)]
PASSING = [
    *THROTTLED,
    answer("ConditionalRequestConflict", 409),
    answer("InternalError", 500),
    answer("500", 500),
    answer("RequestTimeout", 400),
    answer("NeverHeardOf", 502),
    botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"),
    botocore.exceptions.ConnectTimeoutError(endpoint_url="http://x"),
    botocore.exceptions.EndpointConnectionError(endpoint_url="http://x", error="refused"),
    botocore.exceptions.ConnectionClosedError(endpoint_url="http://x"),
    botocore.exceptions.ResponseStreamingError(error="cut"),
    aiohttp.ClientPayloadError("cut"),
    aiohttp.ServerDisconnectedError(),
    web_answer(429),
    web_answer(503),
    FSTimeoutError(),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    TimeoutError(),
    OSError(errno.EIO, "input/output error"),
]
LASTING = [
    answer("AccessDenied", 403),
    answer("403", 403),
    answer("InvalidBucketName", 400),
    answer("SignatureDoesNotMatch", 403),
    answer("EntityTooLarge", 400),
    answer("NotImplemented", 501),
    web_answer(403),
    web_answer(410),
    aiohttp.InvalidURL("http:///a.jpg"),
    botocore.exceptions.NoCredentialsError(),
    botocore.exceptions.ParamValidationError(report="x"),
    PermissionError("no"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("what?"),
]


class Failing:
    """An fsspec client that fails as told before it does anything, one error for each call."""

    def __init__(self, client: Any, errors: list[Exception]) -> None:
        self.client, self.errors, self.calls = client, errors, 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name == "_strip_protocol":  # reads an address, and asks nobody
            return self.client._strip_protocol

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.errors:
                raise self.errors.pop(0)
            return getattr(self.client, name)(*arguments, **options)

        return call


FailingStorage = Callable[..., tuple[Storage, Failing]]


@pytest.fixture
def failing(memory_url: str, monkeypatch: pytest.MonkeyPatch) -> FailingStorage:
    """Makes all storages fail with these errors from now on, and gives one."""

    def make(*errors: Exception) -> tuple[Storage, Failing]:
        client = Failing(fsspec.filesystem("memory"), list(errors))
        monkeypatch.setattr(RemoteFiles, "client", client)
        return Storage(memory_url), client

    return make


DOINGS: dict[str, Callable[[Storage], object]] = {
    "read": lambda storage: storage.read_bytes("a"),
    "write": lambda storage: storage.write_bytes("b", b"2"),
    "list": lambda storage: storage.list(),
    "entries": lambda storage: storage.entries(),
    "size": lambda storage: storage.size("a"),
    "open": lambda storage: storage.open_input("a").read(),
    "delete": lambda storage: storage.delete("a"),
    "delete files": lambda storage: storage.delete_files(["a"]),
    "settle": lambda storage: storage.create_or_read("c", b"3"),
}


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)


@pytest.mark.parametrize("doing", DOINGS)
def test_everything_but_the_bare_create_is_tried_again(memory_url: str, failing: FailingStorage, doing: str) -> None:
    Storage(memory_url).write_bytes("a", b"1")
    for error in PASSING:
        storage, client = failing(error, error)
        DOINGS[doing](storage)
        assert client.errors == [] and client.calls >= 3
        storage.write_bytes("a", b"1")


@pytest.mark.parametrize("error", LASTING, ids=lambda error: type(error).__name__)
def test_what_will_not_pass_is_told_at_once(memory_url: str, failing: FailingStorage, error: Exception) -> None:
    Storage(memory_url).write_bytes("a", b"1")
    for do in DOINGS.values():
        storage, client = failing(error)
        problem = Problem.NO_PERMISSION if isinstance(error, PermissionError) else Problem.REFUSED
        with raises(StorageError, problem, where=re.compile(f"^{memory_url}")) as caught:
            do(storage)
        assert caught.value.__cause__ is error
        assert client.calls == (2 if do is DOINGS["settle"] else 1)  # that looks at what is there


def test_a_bare_create_is_tried_again_only_where_nothing_was_done(failing: FailingStorage) -> None:
    for number, error in enumerate([*THROTTLED, answer("ConditionalRequestConflict", 409), answer("409", 409)]):
        storage, client = failing(error, error)
        assert storage.create_exclusive(f"log/{number}", b"1")
        assert client.calls == 3
    for error in (answer("InternalError", 500), ConnectionResetError(errno.ECONNRESET, "reset")):
        storage, client = failing(error)
        with raises(StorageError, Problem.REFUSED, where=storage.full("log/x")):
            storage.create_exclusive("log/x", b"1")
        assert client.calls == 1
    for error in (answer("PreconditionFailed", 412), answer("412", 412), FileExistsError("log/1")):  # another was first
        storage, client = failing(error)
        assert not storage.create_exclusive("log/1", b"x")
        assert client.calls == 1


def test_an_error_says_how_often_it_was_tried(
    failing: FailingStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote, "PATIENCE_S", 0.5)
    monkeypatch.setattr(remote, "_WARN_AFTER_S", 0.01)
    storage, client = failing(*[answer("SlowDown", 503)] * 100_000)
    found = {"action": "read", "where": storage.full("a"), "reason": re.compile("SlowDown")}
    with raises(StorageError, Problem.REFUSED_OFTEN, **found) as caught:
        storage.read_bytes("a")
    assert client.calls == caught.value.values["times"] > 2
    assert caplog.text.count("SlowDown; trying again") == 1


def test_a_quota_ends_a_commit_and_leaves_nothing_of_it(tmp_path: Path, info: StoreInfo) -> None:
    """For all users: a limit on the size of a file, in the middle of which the writing stops."""
    store = FeatureStore.create(tmp_path / "store", info.model_copy(update={"dim": 4096}))
    put(store, 4)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    large = make_rows(400, store.info, first=4)
    with full_from(100_000), raises(StorageError, Problem.REFUSED, action="write", reason="File too large"):
        store.put(large)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    assert store.put(make_rows(1, store.info, first=4)).version == 2
    assert not verify(store).problems


FAULTS = [Fault.CUT, Fault.CUT_ANSWER, Fault.LOSE_ANSWER, Fault.SLOW_DOWN, Fault.SERVER_ERROR]
FAULTS += [Fault.SERVER_ERROR_AFTER_WORK]


@pytest.fixture
def s3_store(s3_url: str, info: StoreInfo, request: pytest.FixtureRequest) -> FeatureStore:
    """An empty store, behind the proxy from now on."""
    url = FeatureStore.create(f"{s3_url}/features", info).url
    request.getfixturevalue("proxy")
    return FeatureStore.open(url)


@pytest.mark.parametrize("fault", [*FAULTS, Fault.CONFLICT])
def test_a_commit_that_meets_a_fault_is_made_once(s3_store: FeatureStore, proxy: Proxy, fault: Fault) -> None:
    s3_store.put(make_rows(1, s3_store.info), "before")
    left = [fault] * 2
    proxy.rule = lambda request: left.pop() if left and request.is_create and "/log/" in request.path else None
    assert s3_store.put(make_rows(5, s3_store.info, seed=1), "mine").version == 2
    assert len(proxy.faults) >= 1
    assert [log.read_manifest(s3_store.storage, each).operation for each in (1, 2)] == ["before", "mine"]
    assert log.versions(s3_store.storage) == [1, 2] and s3_store.snapshot().num_rows == 5


def test_a_year_of_work_with_many_requests_failing(s3_store: FeatureStore, proxy: Proxy, tmp_path: Path) -> None:
    chance, lock = random.Random(0), threading.Lock()

    def rule(request: Request) -> Fault | None:
        with lock:
            return chance.choice(FAULTS) if chance.random() < 0.15 else None

    proxy.rule = rule
    model: dict[int, np.ndarray] = {}
    for step in range(4):
        rows = make_rows(8, s3_store.info, seed=step, first=4 * step)
        s3_store.put(rows, f"put {step}")
        model |= dict(zip(rows.keys_N.tolist(), rows.features_ND, strict=True))
    gone = keys_of_uris(["images/0.jpg", "images/19.jpg"])
    s3_store.delete(gone, "delete")
    for key in gone.tolist():
        del model[key]
    compact(s3_store)
    assert not verify(s3_store).problems
    with FeaturePartition.load(s3_store.url, cache_dir=tmp_path / "cache") as partition:
        keys = np.array(sorted(model))
        assert np.array_equal(partition.lookup(keys).features_UD, np.array([model[key] for key in keys.tolist()]))
    expire(s3_store, keep_last=1, keep_days=0, grace_days=0)
    proxy.rule = lambda request: None
    assert len(proxy.faults) > 30 and set(proxy.faults) == set(FAULTS)
    assert s3_store.snapshot().keys().tolist() == sorted(model)
    assert len(s3_store.storage.list("log")) == 1
