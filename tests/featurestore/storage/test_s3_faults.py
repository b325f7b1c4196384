"""S3 that loses answers, throttles, fails, cuts connections or dies: one commit each, the right verdict, no damage."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from featurestore import FeaturePartition, FeatureStore, StoreInfo, keys_of_uris, log
from featurestore.errors import StorageError
from featurestore.storage import remote
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import expire
from featurestore.upkeep.verify import verify
from tests.proxy import Fault, Proxy, Request, proxy_before
from tests.servers import environment_of

PASSING = [Fault.CUT, Fault.CUT_ANSWER, Fault.LOSE_ANSWER, Fault.SLOW_DOWN, Fault.SERVER_ERROR]
PASSING += [Fault.SERVER_ERROR_AFTER_WORK]


@pytest.fixture
def info(info: StoreInfo) -> StoreInfo:
    """Fewer shards: each is a file of each commit."""
    return info.model_copy(update={"num_shards": 4})


@pytest.fixture(scope="module")
def module_proxy(s3_endpoint: str) -> Iterator[Proxy]:
    with proxy_before(s3_endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxy(module_proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy that does nothing yet; the environment leads to it."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    with environment_of(module_proxy.endpoint):
        yield module_proxy
    module_proxy.rule = lambda request: None
    module_proxy.faults.clear()


@pytest.fixture
def s3_store(s3_url: str, info: StoreInfo, request: pytest.FixtureRequest) -> FeatureStore:
    """An empty store, behind the proxy from now on."""
    url = FeatureStore.create(f"{s3_url}/features", info).url
    request.getfixturevalue("proxy")
    return FeatureStore.open(url)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE_S", 0.3)


def first(count: int, fault: Fault, of: Callable[[Request], bool]) -> Callable[[Request], Fault | None]:
    """A rule: the fault happens to the first requests of a kind."""
    left = [fault] * count
    lock = threading.Lock()

    def rule(request: Request) -> Fault | None:
        with lock:
            return left.pop() if left and of(request) else None

    return rule


def is_commit(request: Request) -> bool:
    return request.is_create and "/log/" in request.path


def operations(store: FeatureStore) -> list[str]:
    return [log.read_manifest(store.storage, version).operation for version in log.versions(store.storage)]


@pytest.mark.parametrize("fault", [*PASSING, Fault.CONFLICT])
def test_a_commit_that_meets_a_fault_is_made_exactly_once(
    s3_store: FeatureStore, proxy: Proxy, make_rows, fault: Fault
) -> None:
    s3_store.put(make_rows(1, s3_store.info), "before")
    proxy.rule = first(2, fault, is_commit)
    assert s3_store.put(make_rows(5, s3_store.info, seed=1), "mine").version == 2
    assert len(proxy.faults) >= 1
    assert operations(s3_store) == ["before", "mine"]
    assert s3_store.snapshot().num_rows == 5


@pytest.mark.parametrize("fault", [Fault.LOSE_ANSWER, Fault.SERVER_ERROR_AFTER_WORK])
def test_a_lost_answer_is_found_though_others_went_on(
    s3_store: FeatureStore, proxy: Proxy, make_rows, fault: Fault
) -> None:
    """The writer cannot even read its manifest back until another commit stands after it."""
    lost = threading.Event()

    def rule(request: Request) -> Fault | None:
        if is_commit(request) and not lost.is_set():
            lost.set()
            return fault
        if lost.is_set() and request.method == "GET" and request.path.endswith("1.json"):
            proxy.rule = lambda request: None
            FeatureStore.open(s3_store.url).put(make_rows(1, s3_store.info, first=9), "rival")
            return Fault.CUT
        return None

    proxy.rule = rule
    assert s3_store.put(make_rows(1, s3_store.info), "mine").version == 1
    assert operations(s3_store) == ["mine", "rival"]


def test_a_year_of_work_with_many_requests_failing(
    s3_store: FeatureStore, proxy: Proxy, make_rows, tmp_path: Path
) -> None:
    chance, lock = random.Random(0), threading.Lock()

    def rule(request: Request) -> Fault | None:
        with lock:
            return chance.choice(PASSING) if chance.random() < 0.15 else None

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
    assert len(proxy.faults) > 30 and set(proxy.faults) == set(PASSING)
    assert s3_store.snapshot().keys().tolist() == sorted(model)
    assert len(s3_store.storage.list("log")) == 1


@pytest.mark.parametrize("fault", PASSING)
def test_a_listing_that_meets_a_fault_is_whole(s3_store: FeatureStore, proxy: Proxy, fault: Fault) -> None:
    """An empty one would be taken for an empty store, or for files that nobody needs."""
    storage = s3_store.storage
    for name in ("a", "b"):
        storage.write_bytes(f"log/{name}", b"")
    for look in (
        lambda: storage.list("log"),
        lambda: [entry.path.removeprefix("log/") for entry in storage.entries("log")],
        lambda: [entry.path.removeprefix("log/") for entry in storage.entries("log", recursive=False)],
    ):
        proxy.faults.clear()
        proxy.rule = first(2, fault, lambda request: request.method == "GET")
        assert look() == ["a", "b"]
        assert len(proxy.faults) == 2


@pytest.mark.parametrize("fault", PASSING)
def test_a_server_that_never_recovers_is_one_clear_error(
    s3_store: FeatureStore, proxy: Proxy, make_rows, impatient: None, fault: Fault
) -> None:
    s3_store.put(make_rows(1, s3_store.info))
    proxy.rule = lambda request: fault if request.method == "GET" else None
    start = time.monotonic()
    with pytest.raises(StorageError, match=rf"cannot (read|list) {s3_store.url}.* \(tried \d+ times\)$"):
        s3_store.snapshot()
    assert time.monotonic() - start < 10
    assert len(proxy.faults) >= 2
    proxy.rule = lambda request: None
    assert s3_store.snapshot().num_rows == 1


def test_what_will_not_pass_is_not_tried_again(s3_store: FeatureStore, proxy: Proxy, make_rows) -> None:
    requests: list[Request] = []
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        proxy.rule = requests.append
        with pytest.raises(StorageError, match=r"cannot read .*store\.json: .*signature.*[a-z]; are the cred"):
            FeatureStore.open(s3_store.url)
    assert len(requests) <= 2


def test_an_answer_cut_in_the_middle_of_a_file_is_no_damage(
    s3_store: FeatureStore, proxy: Proxy, make_rows, tmp_path: Path
) -> None:
    rows = make_rows(100, s3_store.info)
    s3_store.put(rows)
    for look in (
        lambda: s3_store.snapshot().get(rows.keys_N),
        lambda: FeaturePartition.load(s3_store.url, cache_dir=tmp_path / "c").lookup(rows.keys_N).features_UD,
    ):
        proxy.faults.clear()
        proxy.rule = first(6, Fault.CUT_ANSWER, lambda request: ".parquet" in request.path)
        assert np.array_equal(look(), rows.features_ND)
        assert len(proxy.faults) == 6
