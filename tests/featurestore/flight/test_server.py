"""The server of features: who may ask it, whom a client trusts, and which snapshots it has open."""

import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pyarrow import flight

from featurestore import FeaturePartition, FeatureStore, StoreInfo, connect, errors, keys_of_uris
from featurestore.commands.look import read_tls
from featurestore.flight.server import OpenSnapshots, follow
from tests.featurestore.conftest import make_rows
from tests.featurestore.flight.conftest import Serve
from tests.security.certificates import Certificate

TOKEN, OTHER = "0123456789abcdef-first", "0123456789abcdef-second"
KEYS = keys_of_uris([f"images/{i}.jpg" for i in range(20)])


@pytest.fixture
def filled(store: FeatureStore, info: StoreInfo) -> FeatureStore:
    store.put(make_rows(20, info))
    return store


@pytest.mark.long
def test_tokens(serve: Serve, filled: FeatureStore, tmp_path: Path) -> None:
    """Every token of the file opens all calls; without one, none is. This server does without TLS."""
    file = tmp_path / "tokens.txt"
    file.write_text(f"# of the notebooks\n{TOKEN}\n\n{OTHER} \n")
    server = serve(filled, "--token-file", file)
    for token in (TOKEN, OTHER):
        with connect(server.address, token=token) as client:
            assert not client.lookup(KEYS).missing_U.any()
    for wrong in (None, "", "x", TOKEN[:-1], TOKEN + "x", TOKEN.upper()):
        words = "needs a token: connect" if wrong is None else "refuses the token"
        with pytest.raises(errors.AccessError, match=words):
            connect(server.address, token=wrong)
    with flight.FlightClient(server.address) as client:
        for call in (
            lambda: list(client.do_action(flight.Action("snapshot", b""))),
            lambda: list(client.do_exchange(flight.FlightDescriptor.for_command(b"{}"))[1]),
        ):
            with pytest.raises(flight.FlightUnauthenticatedError):
                call()
    with pytest.raises(errors.UnavailableError, match="only one side uses TLS") as told:
        connect(f"grpc+tls://127.0.0.1:{server.port}", timeout_s=5)
    assert "\n" not in str(told.value)


@pytest.mark.long
def test_tls(serve: Serve, filled: FeatureStore, tmp_path: Path) -> None:
    """The right authority is trusted; another one, a name that the certificate has not, and one that has expired, are
    refused and named."""
    good, other = Certificate(tmp_path / "good", "localhost"), Certificate(tmp_path / "other", "localhost")
    server = serve(filled, "--host", "localhost", "--tls-cert", good.cert, "--tls-key", good.key)
    assert server.address == f"grpc+tls://localhost:{server.port}"
    with connect(server.address, ca=good.ca) as client:
        assert not client.lookup(KEYS).missing_U.any()
    for ca in (other.ca, None):
        with pytest.raises(errors.AccessError, match=r"^the certificate of .* is refused"):
            connect(server.address, ca=ca)
    with pytest.raises(errors.AccessError, match=r"127\.0\.0\.1"):
        connect(f"grpc+tls://127.0.0.1:{server.port}", ca=good.ca)
    with pytest.raises(errors.UnavailableError, match="only one side uses TLS"):
        connect(f"grpc://localhost:{server.port}", timeout_s=5)
    with pytest.raises(errors.AccessError, match="cannot read"):
        connect(server.address, ca=tmp_path / "nosuch.pem")
    for text in ("", "no certificate"):
        (tmp_path / "other.pem").write_text(text)
        with pytest.raises(errors.AccessError, match=r"other\.pem: it has no certificate in PEM"):
            connect(server.address, ca=tmp_path / "other.pem")
    old = Certificate(tmp_path / "old", not_after=datetime.now(UTC) - timedelta(days=1))
    server = serve(filled, "--tls-cert", old.cert, "--tls-key", old.key)
    with pytest.raises(errors.AccessError, match="expired"):
        connect(server.address, ca=old.ca)


def test_certificate_and_key_must_fit(tmp_path: Path) -> None:
    one, two = Certificate(tmp_path / "one", "localhost"), Certificate(tmp_path / "two", "localhost")
    assert read_tls(one.cert, one.key)[0].startswith("-----BEGIN")
    for cert, key in ((one.cert, two.key), (one.key, one.cert), (one.cert, tmp_path / "nosuch")):
        with pytest.raises(errors.FeatureStoreError, match="not a pair in PEM"):
            read_tls(cert, key)


@pytest.fixture
def filled_store(store: FeatureStore, info: StoreInfo) -> FeatureStore:
    """Five snapshots, of 10, 20, ... rows."""
    for count in range(10, 60, 10):
        store.put(make_rows(count, info, seed=count))
    return store


def opened(store: FeatureStore, tmp_path: Path, **options: object) -> OpenSnapshots:
    return OpenSnapshots(store, cache_dir=tmp_path / "cache", **options)  # type: ignore[arg-type]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The versions that were opened, in order; each takes a moment."""
    load, versions = FeaturePartition.load, []

    def noted(*args: object, **options: object) -> FeaturePartition:
        versions.append(options["version"])
        time.sleep(0.05)
        return load(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(FeaturePartition, "load", noted)
    return versions


def rows_of(snapshots: OpenSnapshots, version: int | None) -> int:
    return snapshots.partition(version).num_rows


def test_the_least_used_one_goes_first_and_the_newest_stays(
    filled_store: FeatureStore, tmp_path: Path, loads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featurestore.flight.server.MAX_OLDER", 2)
    snapshots = opened(filled_store, tmp_path)
    asked = (1, 2, 1, None, 3, 1, 5, 2)
    assert [rows_of(snapshots, version) for version in asked] == [10, 20, 10, 50, 30, 10, 50, 20]
    assert loads == [5, 1, 2, 3, 2]


def test_what_is_used_answers_after_others_took_its_place(
    filled_store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is unmapped when nobody uses it any more."""
    monkeypatch.setattr("featurestore.flight.server.MAX_OLDER", 1)
    snapshots = opened(filled_store, tmp_path)
    one, keys = snapshots.partition(1), filled_store.snapshot(1).keys()
    assert [rows_of(snapshots, version) for version in (2, 3)] == [20, 30]
    assert len(one.lookup(keys).features_UD) == 10
    unmapped = weakref.ref(one)
    del one
    assert unmapped() is None


def test_a_snapshot_that_cannot_be_opened_is_tried_again(
    filled_store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = opened(filled_store, tmp_path)
    with monkeypatch.context() as patch:

        def damaged(*_: object, **__: object) -> None:
            raise errors.CorruptFileError("damaged")

        patch.setattr(FeaturePartition, "load", damaged)
        with pytest.raises(errors.CorruptFileError):
            snapshots.partition(3)
    assert rows_of(snapshots, 3) == 30


def test_many_threads_open_one_snapshot_once(filled_store: FeatureStore, tmp_path: Path, loads: list[int]) -> None:
    snapshots = opened(filled_store, tmp_path)
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(lambda _: rows_of(snapshots, 4), range(8))] == [40] * 8
    assert loads == [5, 4]


def test_following_reports_each_thing_once(filled_store: FeatureStore, info: StoreInfo, tmp_path: Path) -> None:
    said: list[str] = []
    snapshots = opened(filled_store, tmp_path)
    ended = threading.Event()
    follower = threading.Thread(target=follow, args=(snapshots, 0.01, said.append, ended))
    follower.start()
    filled_store.put(make_rows(70, info, seed=9))
    end = time.monotonic() + 30
    while not said and time.monotonic() < end:
        time.sleep(0.01)
    manifests = tmp_path / "store" / "log"
    (manifests / f"{7:020d}.json").write_text("{}")
    while len(said) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)
    ended.set()
    follower.join()
    assert said[0] == "offers snapshot 6" and said[1].startswith("stays at snapshot 6: ") and len(said) == 2
    assert rows_of(snapshots, None) == 70
