"""What goes wrong between a client and a server: each is a clear error in time, and the server answers others."""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from pyarrow import flight

from featurestore import FeatureStore, StoreInfo, connect, keys_of_uris
from featurestore.errors import DeadlineError, UnavailableError
from featurestore.flight.protocol import KEYS_SCHEMA, MAX_KEYS
from tests.featurestore.conftest import put
from tests.featurestore.flight.conftest import Serve, lookup_once_up

WIDE = 4096


@pytest.fixture
def wide(info: StoreInfo, tmp_path: Path) -> FeatureStore:
    """A store whose answers are larger than what a connection holds on the way."""
    store = FeatureStore.create(tmp_path / "wide", info.model_copy(update={"dim": WIDE}))
    put(store, 64)
    return store


KEYS = keys_of_uris([f"images/{i}.jpg" for i in range(64)])


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
        wait_until_refused(server.address)
        assert server.process.exitcode is None
        rows += sum(chunk.data.num_rows for chunk in reader)
    server.process.join(30)
    assert server.process.exitcode == 0
    assert rows == 12_000
    assert serve(wide).end(signal.SIGINT) == 130


def wait_until_refused(address: str) -> None:
    """Call a server until it takes no new calls."""
    end_s = time.monotonic() + 10
    with pytest.raises(UnavailableError):
        while time.monotonic() < end_s:
            with connect(address) as client:
                client.lookup(KEYS[:1])
            time.sleep(0.05)


@pytest.mark.long
def test_a_server_that_does_not_answer_in_time_and_is_killed_in_the_middle(serve: Serve, wide: FeatureStore) -> None:
    server = serve(wide)
    with connect(server.address, timeout_s=2) as client:
        client.lookup(KEYS)
        server.send(signal.SIGSTOP)
        while psutil.Process(server.process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)  # SIGSTOP takes its time on a busy machine
        begun = time.monotonic()
        with pytest.raises(DeadlineError, match="timeout_s=2"):
            client.lookup(KEYS)
        assert time.monotonic() - begun < 5
        server.send(signal.SIGCONT)
        assert len(client.lookup(KEYS).features_UD) == 64
    with connect(server.address, timeout_s=30) as client:
        threading.Timer(0.1, lambda: server.end(signal.SIGKILL)).start()
        begun = time.monotonic()
        with pytest.raises(UnavailableError, match="connection broke"):
            client.lookup(np.resize(KEYS, 100_000))
        assert time.monotonic() - begun < 30
        with pytest.raises(UnavailableError, match="no feature server answers"):
            client.contains(KEYS)
        serve(wide, "--port", str(server.port))
        assert len(lookup_once_up(client, KEYS).features_UD) == 64


@pytest.mark.services
def test_who_listens_is_no_feature_server() -> None:
    """A server of another kind that says nothing, and a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"grpc://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises((DeadlineError, UnavailableError), match=address):
            connect(address, timeout_s=1)
    with pytest.raises(UnavailableError, match="no feature server answers"):
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
        for command, batch, word in (
            (b"{", keys, "Asked"),
            (b'{"version": "x"}', keys, "version"),
            (b'{"version": -1}', keys, "-1 is not a version"),
            (b'{"nosuch": 1}', keys, "nosuch"),
            (b"{}", pa.record_batch([pa.array(["a"])], names=["key"]), "int64"),
            (b"{}", pa.record_batch([pa.array([1, None])], names=["key"]), "nulls"),
            (b"{}", pa.record_batch([pa.array([1])], names=["id"]), "one column"),
            (b"{}", keys_batch(np.zeros(MAX_KEYS + 1, np.int64)), "above the limit of 1,048,576: send several"),
            (b'{"version": 2}', keys, "has no snapshot"),
        ):
            with pytest.raises(flight.FlightServerError, match=word):
                exchange(command, batch)
        with pytest.raises(flight.FlightServerError, match="no action"):
            list(client.do_action(flight.Action("stop", b"")))
        assert len(list(client.do_action(flight.Action("snapshot", b"{}")))) == 1


@pytest.mark.parametrize(
    "text",
    ["", "127.0.0.1:1", "http://a:1", "grpc://a", "grpc://a:x", "grpc://a:1,b:2", "grpc://a:1/x"],
)
def test_what_is_no_address_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is not the address of a feature server"):
        connect(text)
