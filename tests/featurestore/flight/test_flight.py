"""Features over the wire: the bits of a partition, who may ask, which snapshots are open, and what goes wrong."""

import re
import signal
import socket
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import psutil
import pyarrow as pa
import pytest
from pyarrow import flight

from featurestore import FeatureClient, FeaturePartition, FeatureStore, StoreInfo, connect, errors
from featurestore.commands.look import read_tls
from featurestore.flight.client import _keys
from featurestore.flight.protocol import KEYS_SCHEMA, MAX_KEYS
from featurestore.flight.server import OpenSnapshots, follow
from featurestore.keys import keys_of_uris
from featurestore.log import manifest_path
from featurestore.problems import Problem
from featurestore.upkeep.expiry import expire
from featurestore.upkeep.history import move_channel
from tests.cli import wait_until
from tests.featurestore.conftest import fill, put
from tests.featurestore.flight.conftest import Serve, lookup_once_up
from tests.raised import raises, told
from tests.security.certificates import Certificate

ROWS = 3_000
TOKEN, OTHER = "0123456789abcdef-first", "0123456789abcdef-second"


def keys_of(images: Iterable[int]) -> np.ndarray:
    return keys_of_uris([f"images/{i}.jpg" for i in images])


KEYS = keys_of(range(64))


@pytest.fixture
def wide(info: StoreInfo, tmp_path: Path) -> FeatureStore:
    """Rows of KEYS in a store whose answers are larger than what a connection holds on the way."""
    store = FeatureStore.create(tmp_path / "wide", info.model_copy(update={"dim": 4096}))
    put(store, 64)
    return store


def make_store(folder: Path, info: StoreInfo, rows: int = ROWS) -> FeatureStore:
    """A store of drawn rows, some of which were replaced and removed since."""
    store = FeatureStore.create(folder, info)
    fill(store, rows, rows // 3, rows // 7)
    return store


def any_keys(rows: int = ROWS) -> np.ndarray:
    """Keys that are there, twice, removed ones, and strange ones, shuffled."""
    known = keys_of(range(rows))
    strange = np.array([0, -1, np.iinfo(np.int64).min, np.iinfo(np.int64).max])
    return np.random.default_rng(1).permutation(np.concatenate([known, known[::3], strange]))


def assert_same(client: FeatureClient, store: FeatureStore, folder: Path, keys_U: np.ndarray) -> None:
    """Client and partition give the same bits, the same mask and the same properties."""
    with FeaturePartition.load(store, cache_dir=folder / "cache", missing="zeros") as partition:
        expected, found = partition.lookup(keys_U), client.lookup(keys_U)
        assert found.features_UD.dtype == expected.features_UD.dtype
        assert found.features_UD.tobytes() == expected.features_UD.tobytes()
        np.testing.assert_array_equal(found.missing_U, expected.missing_U)
        np.testing.assert_array_equal(client.contains(keys_U), partition.contains(keys_U))
        for name in ("dim", "num_rows", "snapshot_version", "snapshot_id", "info", "missing_count"):
            assert getattr(client, name) == getattr(partition, name), name
        values_ND = partition.codec.decode(expected.features_UD)
        np.testing.assert_array_equal(client.codec.decode(found.features_UD), values_ND)


@pytest.mark.parametrize("keys", [[1.5], [2.0**60], ["shoe/1.jpg"]])
def test_keys_that_are_no_whole_numbers_are_refused(keys: list[object]) -> None:
    with pytest.raises(TypeError, match=told(Problem.KEYS_NOT_INT64, value=np.asarray(keys).dtype)):
        _keys(keys)  # type: ignore[arg-type]
    assert (_keys([]).shape, _keys(7).shape) == ((0,), (1,))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_bits_of_a_partition(dtype: str, info: StoreInfo, serve: Serve, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", info.model_copy(update={"dtype": dtype, "dim": 12}))
    server = serve(store)
    with connect(server.address, missing="zeros") as client:
        assert_same(client, store, tmp_path, any_keys())


@pytest.mark.long
def test_few_keys_many_keys_and_none(
    info: StoreInfo, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None, one, one that is missing, one key very often, and more than fit into one message, block or call."""
    monkeypatch.setattr("featurestore.flight.client._CALL_BYTES", 34 << 20)
    store = make_store(tmp_path / "store", info.model_copy(update={"dim": 2048}), 300)
    known = keys_of([299])
    server = serve(store)
    with connect(server.address, missing="zeros") as client:
        for keys_U in (known[:0], known, np.array([3]), np.repeat(known, 5_000), np.resize(any_keys(300), 10_000)):
            client.missing_count = 0
            assert_same(client, store, tmp_path, keys_U)
        out = np.empty((1, 2048), np.uint16)
        assert client.lookup(known, out=out).features_UD is out
        with pytest.raises(ValueError, match=told(Problem.OUT_DOES_NOT_FIT, value=(1, 1024))):
            client.lookup(known, out=out[:, ::2])
    assert 10_000 * store.info.row_bytes > 34 << 20


@pytest.mark.long
def test_missing_policies_and_two_clients_in_two_threads_each(info: StoreInfo, serve: Serve, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", info)
    server = serve(store)
    gone, keys_U = keys_of([7, 2_999]), any_keys()
    where = f"snapshot 3 of {store.url} at {server.address}"
    found = {"number": 1, "where": where, "value": gone[0]}
    with connect(server.address) as client, raises(errors.MissingKeysError, Problem.NO_FEATURE, **found):
        client.lookup(gone)
    for missing in ("zeros", "learned"):
        with connect(server.address, missing=missing) as client:
            found = client.lookup(gone)
            assert found.missing_U.tolist() == [True, False] and not found.features_UD[0].any()
            assert client.missing_count == 1 and client.missing_policy == missing
    with FeaturePartition.load(store, cache_dir=tmp_path / "cache", missing="zeros") as partition:
        expected = partition.lookup(keys_U).features_UD.tobytes()
    with (
        connect(server.address, missing="zeros") as one,
        connect(server.address, missing="zeros") as two,
        ThreadPoolExecutor(4) as pool,
    ):
        answers = pool.map(lambda client: client.lookup(keys_U).features_UD.tobytes(), [one, two] * 20)
        assert [*answers] == [expected] * 40


@pytest.mark.long
def test_a_snapshot_committed_meanwhile(store: FeatureStore, serve: Serve, tmp_path: Path) -> None:
    """Who is connected keeps what it has; who connects next gets the newest; both numbers can be asked for."""
    put(store, 50)
    server = serve(store, "--poll-s", "0.1")
    keys_U = keys_of(range(60))
    with connect(server.address, missing="zeros") as before:
        old = before.lookup(keys_U)
        put(store, 60, seed=2)
        server.wait_for("offers snapshot 2")
        assert before.lookup(keys_U).features_UD.tobytes() == old.features_UD.tobytes()
    with connect(server.address) as after, connect(server.address, version=1, missing="zeros") as first:
        assert (after.snapshot_version, first.snapshot_version) == (2, 1)
        assert_same(after, store, tmp_path, keys_U)
        assert first.lookup(keys_U).features_UD.tobytes() == old.features_UD.tobytes()
    with pytest.raises(errors.SnapshotNotFoundError, match=told(Problem.NO_SNAPSHOT, where=store.url, value=3)):
        connect(server.address, version=3)
    fixed = serve(store, "--version", "1")
    words = told(Problem.ONE_SNAPSHOT_OFFERED, version=1, where=store.url)
    with pytest.raises(errors.SnapshotNotFoundError, match=words):
        connect(fixed.address, version=2)


@pytest.mark.long
def test_a_snapshot_that_expires_meanwhile(store: FeatureStore, serve: Serve) -> None:
    """It is there for as long as the server has it open, and a clear error afterwards."""
    put(store, 50)
    server = serve(store, "--poll-s", "0.1")
    keys_U = keys_of(range(50))
    with connect(server.address) as client:
        old = client.lookup(keys_U).features_UD.tobytes()
        put(store, 60, seed=2)
        expire(store, keep_last=1, keep_days=0, grace_days=0)
        server.wait_for("offers snapshot 2")
        assert client.lookup(keys_U).features_UD.tobytes() == old
        server.end()
        serve(store, "--port", str(server.port))
        with pytest.raises(errors.SnapshotNotFoundError, match=told(Problem.EXPIRED, where=store.url, value=1)):
            lookup_once_up(client, keys_U)


@pytest.mark.long
def test_tokens(serve: Serve, wide: FeatureStore, tmp_path: Path) -> None:
    """Every token of the file opens all calls; without one, none is. This server does without TLS."""
    file = tmp_path / "tokens.txt"
    file.write_text(f"# of the notebooks\n{TOKEN}\n\n{OTHER} \n")
    server = serve(wide, "--token-file", file)
    for token in (TOKEN, OTHER):
        with connect(server.address, token=token) as client:
            assert not client.lookup(KEYS).missing_U.any()
    for wrong in (None, "", "x", TOKEN[:-1], TOKEN + "x", TOKEN.upper()):
        problem = Problem.TOKEN_NEEDED if wrong is None else Problem.TOKEN_REFUSED
        with raises(errors.AccessError, problem, where=server.address):
            connect(server.address, token=wrong)
    with flight.FlightClient(server.address) as client:
        for call in (
            lambda: list(client.do_action(flight.Action("snapshot", b""))),
            lambda: list(client.do_exchange(flight.FlightDescriptor.for_command(b"{}"))[1]),
        ):
            with pytest.raises(flight.FlightUnauthenticatedError):
                call()
    address = f"grpc+tls://127.0.0.1:{server.port}"
    with raises(errors.UnavailableError, Problem.NO_SERVER, where=address) as caught:
        connect(address, timeout_s=5)
    assert "\n" not in str(caught.value)


@pytest.mark.long
def test_tls(serve: Serve, wide: FeatureStore, tmp_path: Path) -> None:
    """The right authority is trusted; another one, a name that the certificate has not, and one that has expired, are
    refused and named."""
    good, other = Certificate(tmp_path / "good", "localhost"), Certificate(tmp_path / "other", "localhost")
    server = serve(wide, "--host", "localhost", "--tls-cert", good.cert, "--tls-key", good.key)
    assert server.address == f"grpc+tls://localhost:{server.port}"
    with connect(server.address, ca=good.ca) as client:
        assert not client.lookup(KEYS).missing_U.any()
    for ca in (other.ca, None):
        with raises(errors.AccessError, Problem.CERTIFICATE_REFUSED, where=server.address):
            connect(server.address, ca=ca)
    address = f"grpc+tls://127.0.0.1:{server.port}"
    with raises(errors.AccessError, Problem.CERTIFICATE_REFUSED, where=address):
        connect(address, ca=good.ca)
    with raises(errors.UnavailableError, Problem.NO_SERVER, where=f"grpc://localhost:{server.port}"):
        connect(f"grpc://localhost:{server.port}", timeout_s=5)
    with raises(errors.AccessError, Problem.CANNOT_READ_CERTIFICATES, where=tmp_path / "nosuch.pem"):
        connect(server.address, ca=tmp_path / "nosuch.pem")
    for text in ("", "no certificate"):
        (tmp_path / "other.pem").write_text(text)
        with raises(errors.AccessError, Problem.NOT_A_CERTIFICATE, where=tmp_path / "other.pem"):
            connect(server.address, ca=tmp_path / "other.pem")
    old = Certificate(tmp_path / "old", not_after=datetime.now(UTC) - timedelta(days=1))
    server = serve(wide, "--tls-cert", old.cert, "--tls-key", old.key)
    with raises(errors.AccessError, Problem.CERTIFICATE_REFUSED, where=server.address, reason=re.compile("expired")):
        connect(server.address, ca=old.ca)


def test_certificate_and_key_must_fit(tmp_path: Path) -> None:
    one, two = Certificate(tmp_path / "one", "localhost"), Certificate(tmp_path / "two", "localhost")
    assert read_tls(one.cert, one.key)[0].startswith("-----BEGIN")
    for cert, key in ((one.cert, two.key), (one.key, one.cert), (one.cert, tmp_path / "nosuch")):
        with raises(errors.FeatureStoreError, Problem.TLS_NOT_A_PAIR, where=cert, value=key):
            read_tls(cert, key)


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


@pytest.fixture
def snapshots(store: FeatureStore, cache: Path) -> OpenSnapshots:
    """Of a store that has five, of 10, 20, ... rows."""
    for count in range(10, 60, 10):
        put(store, count, seed=count)
    return OpenSnapshots(store, cache_dir=cache)


def rows_of(snapshots: OpenSnapshots, version: int | None) -> int:
    return snapshots.partition(version).num_rows


def test_the_least_used_one_goes_first_and_the_newest_stays(
    loads: list[int], snapshots: OpenSnapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featurestore.flight.server.MAX_OLDER", 2)
    asked = (1, 2, 1, None, 3, 1, 5, 2)
    assert [rows_of(snapshots, version) for version in asked] == [10, 20, 10, 50, 30, 10, 50, 20]
    assert loads == [5, 1, 2, 3, 2]


def test_what_is_used_answers_after_others_took_its_place(
    snapshots: OpenSnapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is unmapped when nobody uses it any more."""
    monkeypatch.setattr("featurestore.flight.server.MAX_OLDER", 1)
    one, keys = snapshots.partition(1), snapshots.store.snapshot(1).keys()
    assert [rows_of(snapshots, version) for version in (2, 3)] == [20, 30]
    assert len(one.lookup(keys).features_UD) == 10
    unmapped = weakref.ref(one)
    del one
    assert unmapped() is None


def test_a_snapshot_that_cannot_be_opened_is_tried_again(
    snapshots: OpenSnapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(errors.CorruptFileError):
        patch.setattr(FeaturePartition, "load", Mock(side_effect=errors.CorruptFileError("damaged")))
        snapshots.partition(3)
    assert rows_of(snapshots, 3) == 30


def test_many_threads_open_one_snapshot_once(loads: list[int], snapshots: OpenSnapshots) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(lambda _: rows_of(snapshots, 4), range(8))] == [40] * 8
    assert loads == [5, 4]


def test_only_a_channel_leads_back_to_an_older_snapshot(snapshots: OpenSnapshots, cache: Path) -> None:
    store = snapshots.store
    move_channel(store, "stable", 4)
    of_channel = OpenSnapshots(store, version="stable", cache_dir=cache)
    store.storage.delete(manifest_path(5))  # as a repair does with a damaged one
    assert not snapshots.follow() and snapshots.newest == 5
    move_channel(store, "stable", 2)
    assert of_channel.follow() and of_channel.newest == 2 and not of_channel.follow()


def test_following_reports_each_thing_once(snapshots: OpenSnapshots) -> None:
    said: list[str] = []
    ended = threading.Event()
    follower = threading.Thread(target=follow, args=(snapshots, 0.01, said.append, ended), daemon=True)
    follower.start()
    put(snapshots.store, 70, seed=9)
    wait_until(lambda: said, lambda: "it does not follow")
    snapshots.store.storage.write_bytes(manifest_path(7), b"{}")
    wait_until(lambda: len(said) > 1, lambda: str(said))
    time.sleep(0.1)
    ended.set()
    follower.join()
    assert said[0] == "offers snapshot 6" and said[1].startswith("stays at snapshot 6: ") and len(said) == 2
    assert rows_of(snapshots, None) == 70


def keys_batch(keys_U: np.ndarray) -> pa.RecordBatch:
    return pa.record_batch([pa.array(keys_U)], schema=KEYS_SCHEMA)


@contextmanager
def stuck_reader(address: str) -> Iterator[flight.FlightStreamReader]:
    """A client that asks for 100 MB in 12,000 rows, and does not read them."""
    client = flight.FlightClient(address)
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(b"{}"))
    writer.begin(KEYS_SCHEMA)
    for _ in range(4):
        writer.write_batch(keys_batch(np.resize(KEYS, 3_000)))
    writer.done_writing()
    try:
        yield reader
    finally:
        reader.cancel()
        client.close()


@pytest.mark.long
def test_a_client_that_never_reads_holds_up_nobody_and_sigterm_lets_it_end(serve: Serve, wide: FeatureStore) -> None:
    """And refuses new ones; Ctrl-C ends a server too."""
    server = serve(wide)
    with stuck_reader(server.address) as reader:
        with connect(server.address) as client:
            assert len(client.lookup(KEYS).features_UD) == 64
        rows = reader.read_chunk().data.num_rows
        server.send(signal.SIGTERM)
        end_s = time.monotonic() + 10
        with raises(errors.UnavailableError, Problem.NO_SERVER, where=server.address):  # it takes no new calls
            while time.monotonic() < end_s:
                with connect(server.address) as client:
                    client.lookup(KEYS[:1])
        assert server.process.exitcode is None
        rows += sum(chunk.data.num_rows for chunk in reader)
    server.process.join(30)
    assert server.process.exitcode == 0
    assert rows == 12_000
    assert serve(wide).end(signal.SIGINT) == 130


@pytest.mark.long
def test_a_server_that_does_not_answer_in_time_and_is_killed_in_the_middle(serve: Serve, wide: FeatureStore) -> None:
    server = serve(wide)
    with connect(server.address, timeout_s=2) as client:
        client.lookup(KEYS)
        server.send(signal.SIGSTOP)
        while psutil.Process(server.process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)  # SIGSTOP takes its time on a busy machine
        begun = time.monotonic()
        with raises(errors.DeadlineError, Problem.NO_ANSWER_IN_TIME, where=server.address, seconds=2):
            client.lookup(KEYS)
        assert time.monotonic() - begun < 5
        server.send(signal.SIGCONT)
        assert len(client.lookup(KEYS).features_UD) == 64
    with connect(server.address, timeout_s=30) as client:
        threading.Timer(0.1, lambda: server.end(signal.SIGKILL)).start()
        begun = time.monotonic()
        with raises(errors.UnavailableError, Problem.NO_SERVER, where=server.address):
            client.lookup(np.resize(KEYS, 100_000))
        assert time.monotonic() - begun < 30
        with raises(errors.UnavailableError, Problem.NO_SERVER, where=server.address):
            client.contains(KEYS)
        serve(wide, "--port", str(server.port))
        assert len(lookup_once_up(client, KEYS).features_UD) == 64


@pytest.mark.services
def test_who_listens_is_no_feature_server() -> None:
    """A server of another kind that says nothing, and a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"grpc://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises((errors.DeadlineError, errors.UnavailableError)) as caught:
            connect(address, timeout_s=1)
        assert caught.value.values["where"] == address
    with raises(errors.UnavailableError, Problem.NO_SERVER, where=address):
        connect(address, timeout_s=5)


@pytest.mark.long
def test_requests_that_are_none(serve: Serve, wide: FeatureStore) -> None:
    """Other columns, nulls, other commands and actions: an error each, and the server lives."""
    server = serve(wide)

    def exchange(command: bytes, batch: pa.RecordBatch) -> None:
        writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(command))
        writer.begin(batch.schema)
        writer.write_batch(batch)
        writer.done_writing()
        reader.read_all()

    keys = keys_batch(KEYS)
    with flight.FlightClient(server.address) as client:
        wrong_columns = [
            pa.record_batch([pa.array(["a"])], names=["key"]),
            pa.record_batch([pa.array([1, None])], names=["key"]),
            pa.record_batch([pa.array([1])], names=["id"]),
        ]
        for command, batch, words in (
            (b"{", keys, told(Problem.BAD_REQUEST, where="Asked")),
            (b'{"version": "x"}', keys, told(Problem.BAD_REQUEST, where="Asked", reason=re.compile("version"))),
            (b'{"version": -1}', keys, told(Problem.NEGATIVE_VERSION, value=-1)),
            (b'{"nosuch": 1}', keys, told(Problem.BAD_REQUEST, where="Asked", reason=re.compile("nosuch"))),
            *((b"{}", batch, told(Problem.WRONG_KEY_COLUMNS, where="key")) for batch in wrong_columns),
            (b"{}", keys_batch(np.zeros(MAX_KEYS + 1, np.int64)), told(Problem.TOO_MANY_KEYS, value=MAX_KEYS + 1)),
            (b'{"version": 2}', keys, told(Problem.NO_SNAPSHOT, where=wide.url, value=2)),
        ):
            with pytest.raises(flight.FlightServerError, match=words):
                exchange(command, batch)
        with pytest.raises(flight.FlightServerError, match=told(Problem.UNKNOWN_ACTION, value="stop")):
            list(client.do_action(flight.Action("stop", b"")))
        assert len(list(client.do_action(flight.Action("snapshot", b"{}")))) == 1


@pytest.mark.parametrize(
    "text", ["", "127.0.0.1:1", "http://a:1", "grpc://a", "grpc://a:x", "grpc://a:1,b:2", "grpc://a:1/x"]
)
def test_what_is_no_address_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=told(Problem.NOT_A_SERVER_ADDRESS, where=text)):
        connect(text)
